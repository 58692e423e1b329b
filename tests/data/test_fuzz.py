"""No bytes make a reader raise anything but our own errors, hang, or take memory beyond its limits.

Small counts by default; the marker `slow` runs over 100,000 inputs (four of each seed). The environment variable
STILLROOM_FUZZ_EXAMPLES sets another count.
"""

from __future__ import annotations

import atexit
import gzip
import json
import os
import random
import shutil
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.data import DataWarning, ReadLimits, Rejection, check, read
from stillroom.data.advice import advice
from stillroom.data.jsontext import decode
from stillroom.data.loose_json import read_loosely
from stillroom.data.reasons import Reject
from stillroom.schema import Example, Message, to_dict
from tests.data.records import asked, bedrock, bfcl, line, log, openai, said, tool
from tests.data.test_readers import ANTHROPIC, ANTHROPIC_STREAM, AWS_TOOLS, LLAMA3, NATIVE, NOVA_STREAM

FEW = int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", "150"))
MANY = int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", "26000"))
MIB = 2**20
LIMITS = ReadLimits(line_bytes=20_000, body_bytes=20_000, total_bytes=2_000_000)
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
SEEDS: dict[str, list[Any]] = {
    "bedrock": [
        bedrock("q", "a", system=[{"text": AWS_TOOLS}]),
        bedrock(
            "q", '[f(query="x")]', toolConfig={"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {}}}}]}
        ),
    ],
    "openai": [
        openai({"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        openai(
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            tools=[{"type": "function", "function": tool("f")}],
        ),
    ],
    "invocation_logs": [
        log(),
        log(asked("q", toolConfig={"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": {}}}}]}), NOVA_STREAM),
        log(ANTHROPIC, ANTHROPIC_STREAM, "InvokeModelWithResponseStream"),
        log({"prompt": LLAMA3}, {"generation": "x"}, "InvokeModel"),
        *(log(request, response, "InvokeModelWithResponseStream") for request, response in NATIVE.values()),
        log() | {"input": {"inputBodyS3Path": "s3://b/p/data/x_input.json.gz"}},
    ],
    "bfcl": [bfcl("a", "hello there", "f", "g")],
}
JUNK = [
    None,
    True,
    0,
    -1,
    1e308,
    2**70,
    "",
    " ",
    "\0",
    "x" * 300,
    "\u2028",
    "😀",
    [],
    {},
    [[]],
    [{}],
    {"text": "x"},
    {"": ""},
]
FOLDER = Path(tempfile.mkdtemp())  # one for all: making one for each of 100,000 inputs would take most of the time
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
SHAPES = st.recursive(
    st.sampled_from(JUNK) | st.text(max_size=20) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BYTES = [
    b"\xff",
    b"\x00",
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"NaN",
    b"\\ud800",
    b"\\u0022",
    b"\n",
    b"1e999",
]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_in(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], junk: Any, draw: random.Random) -> Any:
    """A copy with one place replaced, removed or doubled."""
    if not path:
        return junk
    copy = value.copy()
    key, *rest = path
    if rest:
        copy[key] = replaced(value[key], tuple(rest), junk, draw)
    elif draw.random() < 0.2:
        del copy[key]
    elif isinstance(copy, list) and draw.random() < 0.3:
        copy.insert(key, junk)
    else:
        copy[key] = junk
    return copy


def mutated(seed: Any, junk: Any, draw: random.Random) -> bytes:
    """A record with a few places changed, as bytes with perhaps a few bytes changed."""
    record = seed
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        record = replaced(record, draw.choice(list(paths_in(record))), junk, draw)
    text = json.dumps(record).encode()
    for _ in range(draw.choice([0, 0, 0, 1, 2])):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(BYTES) + text[at + draw.choice([0, 1, 5]) :]
    return text + b"\n"


def assert_survives(content: bytes, format: str, name: str) -> None:
    """Reading gives findings and nothing else, each with its place, in little memory."""
    path = FOLDER / name
    path.write_bytes(content)
    for finding in read(path, format, limits=LIMITS):
        assert isinstance(finding, Example | Rejection | DataWarning)
        if isinstance(finding, Example):
            assert finding.messages[-1].role != "assistant"
            json.dumps(to_dict(finding)).encode()
        else:
            assert finding.file == str(path)
            json.dumps(finding.to_dict(), ensure_ascii=False).encode()


def fuzz_records(format: str, junk: Any, seed: int) -> None:
    draw = random.Random(seed)
    lines = [mutated(draw.choice(SEEDS[format]), junk, draw) for _ in range(draw.choice([1, 1, 4]))]
    content = b"".join(lines)
    if draw.random() < 0.2:
        content = gzip.compress(content)[: draw.choice([None, None, -1, -8, 20])]
    assert_survives(content, draw.choice([format, "auto"]), draw.choice(["a.jsonl", "a.jsonl.gz", "a.json.gz"]))


def fuzz_bytes(content: bytes, format: str) -> None:
    assert_survives(content, format, "a.jsonl.gz")


def fuzz_json(text: bytes) -> None:
    """Ours refuses, or agrees with the standard library, which must then see no repeated key."""
    try:
        value = decode(text, depth=40)
    except Reject:
        return

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    assert json.loads(text, object_pairs_hook=unique, parse_int=float) == as_floats(value)


def as_floats(value: Any) -> Any:
    """The value with every number a float: beyond 64 bits the two libraries differ in the type."""
    if isinstance(value, list):
        return [as_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: as_floats(item) for key, item in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def fuzz_advice(system: str, answer: str) -> None:
    read_loosely(system)
    example = Example("x", (Message("system", AWS_TOOLS.replace("location", system)), Message("user", answer)))
    advice(example)
    assert_survives(
        line(bedrock(system or "q", answer or "a", system=[{"text": AWS_TOOLS + system}])), "bedrock", "a.jsonl"
    )


FORMATS = st.sampled_from(sorted(SEEDS))
SEED = st.integers(0, 2**32)
ALMOST = [*"{}[],:\"'\\a1 \n", "name", '"name"', "parameters", "f("]
ALMOST_JSON = st.lists(st.sampled_from(ALMOST), max_size=60).map("".join)
RAW = st.binary(max_size=300) | st.lists(st.sampled_from([*BYTES, b'"a"', b"1", b" "]), max_size=60).map(b"".join)
PAIRS = [b'"a":1', b'"b":"\\u0022"', b'"a" : "x"', b'"\\u0061":2', b'"c\\\\":3', b'"d":":"']
KEYED = st.lists(st.sampled_from(PAIRS), max_size=6)
OBJECTS = KEYED.map(lambda pairs: b"{" + b",".join(pairs) + b"}")
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


@settings(max_examples=FEW, **OPTIONS)
@given(FORMATS, SHAPES, SEED)
def test_spoilt_records_are_rejected_not_fatal(format: str, junk: Any, seed: int) -> None:
    fuzz_records(format, junk, seed)


@settings(max_examples=FEW, **OPTIONS)
@given(RAW, FORMATS | st.just("auto"))
def test_any_bytes_are_rejected_not_fatal(content: bytes, format: str) -> None:
    fuzz_bytes(content, format)


@settings(max_examples=FEW, **OPTIONS)
@given(RAW | OBJECTS)
def test_what_is_accepted_as_json_has_no_key_twice(text: bytes) -> None:
    fuzz_json(text)


@settings(max_examples=FEW, **OPTIONS)
@given(ALMOST_JSON | st.text(max_size=80), ALMOST_JSON)
def test_advice_survives_any_text(system: str, answer: str) -> None:
    fuzz_advice(system, answer)


def any_junk(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value, by the quick way: over 100,000 inputs, hypothesis takes longer to draw than the readers to read."""
    kind = draw.random()
    if kind < 0.5 or depth > 2:
        return draw.choice([*JUNK, draw.random(), draw.randrange(-9, 9), any_text(draw)])
    if kind < 0.75:
        return [any_junk(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {any_text(draw): any_junk(draw, depth + 1) for _ in range(draw.randrange(4))}


def any_text(draw: random.Random) -> str:
    return "".join(draw.choice([*ALMOST, chr(draw.randrange(0xD800)), "😀"]) for _ in range(draw.randrange(30)))


def any_bytes(draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return b"{" + b",".join(draw.choices(PAIRS, k=draw.randrange(6))) + b"}"
    return b"".join(draw.choice([*BYTES, *PAIRS, b" ", b"1", draw.randbytes(2)]) for _ in range(draw.randrange(60)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_over_100_000_inputs() -> None:
    for seed in range(MANY):
        draw = random.Random(seed)
        format = draw.choice(sorted(SEEDS))
        try:
            fuzz_records(format, any_junk(draw), seed)
            fuzz_bytes(any_bytes(draw), draw.choice([format, "auto"]))
            fuzz_json(any_bytes(draw))
            fuzz_advice(any_text(draw), any_text(draw))
        except Exception as error:
            raise AssertionError(f"seed {seed}, format {format}") from error


HOSTILE = {
    "open brackets": b"[" * 500_000,
    "open objects": b'{"a":' * 100_000,
    "one string": b'"' + b"x" * 500_000,
    "backslashes": b'"' + b"\\" * 500_001 + b'"',
    "quotes": b'"' * 500_001,
    "spaces": b" " * 500_000 + b"1",
    "digits": b"1" * 500_000,
    "minus": b"-" * 500_000,
    "newlines": b"\n" * 100_000,
    "nul": b"\0" * 500_000,
    "keys": b"{" + b",".join(b'"%d":1' % n for n in range(50_000)) + b"}",
}
HOSTILE_TEXTS = {
    "starts": '[{"' * 20_000,
    "open quotes": "[{'name: " + "'x " * 20_000,
    "apostrophes": "{'a': '" + "it's " * 20_000,
    "spaced quotes": "{'a': '" + "' " * 20_000,
    "colons": "[{" + ":" * 60_000,
    "commas": "[{'a'" + "," * 60_000,
    "nested": "[{'a':" * 5_000,
    "call": "[" + "f(" * 20_000,
    "labels": "\nHuman:" * 10_000,
    "inst": "[INST]" * 10_000,
    "headers": "<|start_header_id|>" * 5_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_lines_take_no_more_memory_than_the_limits(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(bedrock("first")) + HOSTILE[name] + b"\n" + line(bedrock("good")))

    tracemalloc.start()
    findings = list(read(path, "bedrock", limits=ReadLimits(line_bytes=MIB)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert isinstance(findings[-1], Example)
    assert peak < 48 * MIB


@pytest.mark.parametrize("name", HOSTILE_TEXTS)
@pytest.mark.timeout(60)
def test_hostile_texts_do_not_take_forever(name: str, tmp_path: Path) -> None:
    text = HOSTILE_TEXTS[name]
    path = tmp_path / "a.jsonl"
    records = [
        bedrock("q", text, system=[{"text": f"name {text}"}]),
        bedrock("q", "a", system=[{"text": AWS_TOOLS + text}]),
    ]
    path.write_bytes(b"".join(map(line, records)))

    assert check(path).accepted + check(path).rejected == 2
    native = tmp_path / "log.jsonl"
    native.write_bytes(
        line(log({"prompt": text}, {"generation": text or "x"}, "InvokeModel")) + line(log(asked(text), said(text)))
    )
    assert len([each for each in read(native) if not isinstance(each, DataWarning)]) == 2
