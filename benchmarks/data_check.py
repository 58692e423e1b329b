"""How fast does `stillroom data check` go through a data set, and does its memory grow with it?

Records are made up after real ones: system prompts that repeat (a third of them describe tools), user
texts of 100 to 3,000 characters, a third with an answer (half of these tool calls), 2 % bad in ten ways
and 1 % repeats. Each size is checked in a fresh process; the rate is that of the larger, all of
`check` included, with the rejections listed on disk and the page written.

Floor: reading the lines and parsing them with orjson, without looking at what they say.
"""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SIZES = (15_000, 150_000)
REPEATS = 3
TEXT = """
order invoice refund shipping address customer account balance transfer schedule meeting weather forecast city flight
hotel booking cancel update password device network error payment card monthly plan upgrade support please find show
list create delete compare report latest previous between before after tomorrow Monday total
"""
WORDS = TEXT.split()
TOOLS = ["get_weather", "find_flights", "book_hotel", "transfer_money", "open_ticket", "list_invoices"]

CHILD = """
import json, resource, sys, time
from stillroom.data import check
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
started, before = time.perf_counter(), time.process_time()
found = check(sys.argv[1], out=sys.argv[2])
seconds, cpu = time.perf_counter() - started, time.process_time() - before
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, "started_mib": imported,
                  "accepted": found.accepted, "rejected": found.rejected, "warned": found.warned}))
"""
FLOOR = """
import json, sys, time
import orjson
started = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    for line in file:
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            pass
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


def main() -> None:
    """Print every sample, then one line of JSON."""
    samples: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            file = Path(folder, f"{size}.jsonl")
            with file.open("wb") as out:
                out.writelines(records(size))
            print(f"{size:,} records, {file.stat().st_size / 2**20:.1f} MiB")
            for _ in range(REPEATS):
                sample = child(CHILD, file, Path(folder, "found"))
                samples[size].append(sample)
                print(f"  check {size / sample['seconds']:,.0f} records/s  {json.dumps(sample)}")
            floor = child(FLOOR, file)
            print(f"  floor {size / floor['seconds']:,.0f} records/s")
    small, large = SIZES
    rates = sorted(large / sample["seconds"] for sample in samples[large])
    result = {
        "records_per_s": round(rates[len(rates) // 2]),
        "peak_mib_15k": round(max(sample["peak_mib"] for sample in samples[small]), 1),
        "peak_mib_150k": round(max(sample["peak_mib"] for sample in samples[large]), 1),
        "started_mib": round(samples[small][0]["started_mib"], 1),
        "samples_records_per_s": [round(rate) for rate in rates],
        # On a machine that does other work too, this is the steadier figure.
        "samples_records_per_cpu_s": [round(large / sample["cpu_seconds"]) for sample in samples[large]],
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


def child(code: str, *arguments: Path) -> dict[str, float]:
    """Run `code` in a fresh interpreter; its last line of output is its result."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def records(count: int, seed: int = 0) -> Iterator[bytes]:
    """Lines of a data set in the form bedrock-conversation-2024."""
    draw = random.Random(seed)
    systems = [f"You help customers of {' '.join(draw.choices(WORDS, k=12))}." for _ in range(20)]
    systems += [f"{text} Functions: {json.dumps(tools(draw))}" for text in systems[:10]]
    last = b""
    for number in range(count):
        chance = draw.random()
        record = one_record(draw, systems, number)
        if chance < 0.01 and last:
            yield last
        elif chance < 0.03:
            yield spoilt(draw, record)
        else:
            last = json.dumps(record, ensure_ascii=False).encode() + b"\n"
            yield last


def one_record(draw: random.Random, systems: list[str], number: int) -> dict[str, object]:
    """A valid record."""
    text = f"{number}: " + " ".join(draw.choices(WORDS, k=min(450, int(draw.lognormvariate(3.6, 0.8)) + 10)))
    messages = [{"role": "user", "content": [{"text": text}]}]
    system = draw.choice(systems)
    if draw.random() < 0.33:
        answer = f'[{draw.choice(TOOLS)}(query="{text[8:30]}", limit={draw.randint(1, 9)})]'
        plain = " ".join(draw.choices(WORDS, k=30))
        messages.append({"role": "assistant", "content": [{"text": draw.choice([answer, plain])}]})
    return {"schemaVersion": "bedrock-conversation-2024", "system": [{"text": system}], "messages": messages}


def tools(draw: random.Random) -> list[dict[str, object]]:
    """Tool descriptions, as prompts have them."""
    properties = {
        "query": {"type": "string", "description": "What to look for: " + " ".join(draw.choices(WORDS, k=8))},
        "limit": {"type": "integer", "description": "How many results at most."},
    }
    schema = {"type": "object", "properties": properties, "required": ["query"]}
    return [{"name": name, "description": " ".join(draw.choices(WORDS, k=10)), "parameters": schema} for name in TOOLS]


def spoilt(draw: random.Random, record: dict[str, object]) -> bytes:
    """The record with one of ten faults."""
    line = json.dumps(record).encode()
    faults = [
        line[: len(line) // 2],
        line.replace(b'"role": "user"', b'"role": "human"'),
        line.replace(b"conversation-2024", b"conversion-2024"),
        line.replace(b'{"text": "', b'{"image": "', 1),
        line.replace(b'"messages"', b'"mesages"'),
        line.replace(b'"schemaVersion"', b'"system": [], "schemaVersion"', 1),
        line.replace(b"customers", b"customers \xff", 1),
        b"[" * 100 + b"]" * 100,
        json.dumps({**record, "messages": []}).encode(),
        json.dumps({**record, "score": float("nan")}).encode(),
    ]
    return draw.choice(faults) + b"\n"


if __name__ == "__main__":
    main()
