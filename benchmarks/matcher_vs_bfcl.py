"""Does our matcher give the verdict of BFCL's own checker?

Every gold answer of the single-turn Python categories, and mutations of each (matcher_mutations.py), is judged by
both. A disagreement counts as justified only if it is of a kind of which tests/toolcalls/bfcl_defects.json holds a
minimal pair with a reason, and passes that kind's own test below.

    python -m benchmarks.matcher_vs_bfcl
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bfcl_checker import Call, Theirs, entries, load_theirs
from benchmarks.matcher_mutations import answers
from stillroom.schema import ToolCall
from stillroom.toolcalls import golden_call, match, parse_calls, read_tools, render_calls

ANSWERED = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
RELEVANCE = ("irrelevance", "live_irrelevance", "live_relevance")
DEFECTS = Path(__file__).parents[1] / "tests" / "toolcalls" / "bfcl_defects.json"
IMPORT_REPEATS = 10
CLIENTS = ("openai", "anthropic", "boto3", "httpx", "mistralai", "cohere", "google", "torch", "transformers")


def main(examples: int = 1) -> None:
    """Compare on everything; print `examples` of each kind of disagreement."""
    theirs = load_theirs()
    kinds: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    rights = 0
    for category in ANSWERED:
        print(f"judging {category}", file=sys.stderr, flush=True)
        for label, verdict, kind in _answered(theirs, category):
            pairs[category] += 1
            rights += verdict is True
            if kind:
                kinds[kind] += 1
                if kinds[kind] <= examples:
                    print(f"first of {kind}: {label}"[:600])
    for category in RELEVANCE:
        for verdict, kind in _relevance(theirs, category):
            pairs[category] += 1
            rights += verdict
            kinds.update([kind] if kind else [])
    justified = {defect["kind"] for defect in json.loads(DEFECTS.read_text(encoding="utf-8"))}
    for name, table in (("pairs", pairs), ("disagreements", kinds)):
        print(f"{name}:", *(f"  {count:>8,}  {key}" for key, count in table.most_common()), sep="\n")
    print(f"right by BFCL's verdict: {rights:,} of {pairs.total():,}")
    result = {
        "pairs": pairs.total(),
        "disagreements": kinds.total(),
        "unjustified": sum(count for kind, count in kinds.items() if kind not in justified),
        "import_s": import_seconds(),
    }
    print(json.dumps(result))


def _answered(theirs: Theirs, category: str) -> Iterator[tuple[str, bool | str, str]]:
    """For each pair: what it is, BFCL's verdict, and the kind of disagreement ("" where there is none)."""
    for name, raw, expected in entries(category):
        tools = read_tools(raw)
        golden = [(call.name, dict(call.arguments)) for call in golden_call(expected, tools)]
        seen: set[str] = set()
        for label, calls in answers(golden, expected, tools):
            key = repr(calls)
            if key in seen:
                continue
            seen.add(key)
            # With names shown without dots only the comparison of names differs.
            dotless = (label == "golden" or label.startswith("name")) and any("." in call for call, _ in golden)
            for underscore in (False, True) if dotless else (False,):
                verdict = theirs.check(raw, calls, expected, category, underscore_names=underscore)
                ours = match(_ours(calls), expected, tools, category, underscore_names=underscore)
                kind = "" if verdict is ours.ok else _kind(theirs, raw, calls, expected, category, verdict, ours.ok)
                yield f"{name}, {label}: {calls!r:.200}; theirs {verdict}, ours {ours}", verdict, kind


def _ours(calls: Sequence[Call]) -> tuple[ToolCall, ...]:
    """The calls as our own reader gives them, out of the text that they stand for."""
    rendered = render_calls([ToolCall(name, arguments) for name, arguments in calls])
    # A number of 400 digits is past what the reader takes, and is judged as it stands.
    return parse_calls(rendered, "python") if len(rendered) < 400 else tuple(ToolCall(n, _json(a)) for n, a in calls)


def _kind(
    theirs: Theirs, raw: Any, calls: Sequence[Call], expected: Any, category: str, verdict: bool | str, ours: bool
) -> str:
    """Which known kind of disagreement this is, by a test of its cause; else a name of its own."""
    if verdict == "OverflowError" and not ours:
        return "huge_integer_raises"
    as_json = [(name, _json(arguments)) for name, arguments in calls]
    if verdict is False and ours and as_json != list(calls) and theirs.check(raw, as_json, expected, category) is True:
        return "tuple_is_no_list"
    return f"unknown: theirs {verdict}, ours {ours}"


def _json(value: Any) -> Any:
    """The value as JSON has it: tuples are lists."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return [_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _relevance(theirs: Theirs, category: str) -> Iterator[tuple[bool, str]]:
    for _, raw, _ in entries(category):
        tools = read_tools(raw)
        call: Call = (tools[0].name, {}) if tools else ("f", {})
        for calls in (None, [], [call], [call, call]):
            verdict = theirs.check_relevance(calls, category)
            ours = match(None if calls is None else _ours(calls), None, tools, category)
            yield verdict, "" if verdict is ours.ok else f"unknown: relevance of {calls}"


def import_seconds() -> float:
    """Fewest seconds to import our public functions in a fresh interpreter; fails if that imports a client."""
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from stillroom.toolcalls import golden_call, match, parse_calls, read_tools, validate_calls\n"
        "print(time.perf_counter() - start)\n"
        f"sys.exit(', '.join(name for name in {CLIENTS!r} if name in sys.modules) or None)"
    )
    with tempfile.TemporaryDirectory() as cache:
        # With compiled bytecode, as an installed package has it; the first run writes it. The least of the others
        # counts: whatever else the machine does only adds to it.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}
        runs = [
            subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
            for _ in range(1 + IMPORT_REPEATS)
        ]
    return round(min(float(run.stdout) for run in runs[1:]), 4)


if __name__ == "__main__":
    main()
