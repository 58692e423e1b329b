"""How much training does a save cost?

    python -m benchmarks.checkpoint.throughput [--modes shared,spare] [--repeats 5] [--picture PATH]

A Llama with as many tensors as a rank of Llama-3-70B has (723 parameters, and AdamW's three for each) but narrow trains
on the CPU in a process for each side. The sides take turns: train at rest for some seconds, save, train on until
the save is durable and a second longer. All sides wait for their staging before `optimizer.step()`.

Training computes on one thread. `shared`: it and all that a side starts are bound to one core, so whatever a save does
is taken from training. `spare`: nothing is bound, and a second core is free. (Two training threads on two cores were
tried: steps then took 0.2 or 0.6 s from process to process, at rest, which hides what a save costs.)

Lost training-seconds of a save are the integral of (1 - rate/idle) from the call to one second after its end, `idle`
being the rate in the seconds before. `over_idle` and the longest gap between two steps are of the time until the save
is durable, so that of a short save is that of a step or two; `over_idle_10_s` is of ten seconds from the call for all
sides alike. `interval_s` is how far apart saves have to be to cost 1% of the training; the newest durable checkpoint is
then at most that plus `durable_s` old. CPU-seconds are of the process with its descendants, beyond what its steps take.
Compared are `ours`, as it is by default, and the DCP configuration that loses least by the median: its best is found in
the same samples, which favours DCP. The top level of the JSON has lost seconds of `shared`, the rest of `spare`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

from benchmarks.checkpoint.apart import Apart
from benchmarks.checkpoint.pictures import Panel, Series, draw
from benchmarks.checkpoint.sides import environment, median, one_rank, open_side

SIDES = "ours,ours behind,dcp thread,dcp process+cache,dcp process+cache+async"
OURS = "ours"
TITLES = {"shared": "training and saving on one core", "spare": "training on one core of two"}
VOCABULARY, HEADS, KV_HEADS = 512, 4, 2
TAIL_S = 1.0
BIN_S = 0.1


class Block(nn.Module):
    """A Llama layer: nine parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        head = width // HEADS
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk, self.wv = (nn.Linear(width, KV_HEADS * head, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(3 * width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        batch, length, width = x_BTD.shape
        normed = self.attention_norm(x_BTD)
        q, k, v = (
            project(normed).view(batch, length, -1, width // HEADS).transpose(1, 2)
            for project in (self.wq, self.wk, self.wv)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x_BTD = x_BTD + self.wo(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = self.ffn_norm(x_BTD)
        return x_BTD + self.w2(silu(self.w1(normed)) * self.w3(normed))


class Trainer:
    """A training with one side to save it."""

    def __init__(self, side: str, root: Path, mode: str, layers: int, width: int, tokens: int) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        if mode == "shared":  # inherited by whatever is started from here
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(one_rank())
        embedding, output = nn.Embedding(VOCABULARY, width), nn.Linear(width, VOCABULARY, bias=False)
        blocks = (Block(width) for _ in range(layers))
        self.model = nn.Sequential(embedding, *blocks, nn.RMSNorm(width), output)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self.batch = torch.randint(VOCABULARY, (1, tokens + 1))
        self.side_name, self.root, self.side, self.begun = side, root, None, None
        self.step()
        moments = zip(*(self.optimizer.state[p].values() for p in self.model.parameters()), strict=True)
        names = [name for name, _ in self.model.named_parameters()]
        kinds = list(self.optimizer.state[next(self.model.parameters())])
        optimizer = {kind: dict(zip(names, of, strict=True)) for kind, of in zip(kinds, moments, strict=True)}
        self.state = {"model": self.model.state_dict(), "optimizer": optimizer}

    def sizes(self) -> tuple[int, int]:
        """Tensors of the state, and their bytes."""
        tensors = [*self.state["model"].values(), *(t for of in self.state["optimizer"].values() for t in of.values())]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    def open(self) -> float:
        """Seconds that setting up took."""
        self.side = open_side(self.side_name, self.root, self.state)
        return float(self.side.set_up_s)

    def step(self) -> None:
        logits = self.model(self.batch[:, :-1])
        cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten()).backward()
        if self.begun is not None:
            self.begun.staged()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, idle_s: float) -> dict[str, Any]:
        """Train, save, train on.

        Returns:
            The seconds at which steps ended, counted from the call that saved; how long the call held its caller and
            how long it took to be durable; CPU-seconds of a step at rest, and of this process after the call.
        """
        began, cpu_began = time.perf_counter(), time.process_time()
        ends = [began]
        while ends[-1] - began < idle_s:
            self.step()
            ends.append(time.perf_counter())
        cpu_saved, at_rest = time.process_time(), len(ends) - 1
        begun = self.begun = self.side.save()
        while begun.durable_s is None or ends[-1] < begun.began + begun.durable_s + TAIL_S:
            self.step()
            ends.append(time.perf_counter())
        cpu_ended, self.begun = time.process_time(), None
        self.side.forget()
        return {
            "ends": [round(end - begun.began, 5) for end in ends], "held_s": begun.held_s, "durable_s": begun.durable_s,
            "step_cpu_s": (cpu_saved - cpu_began) / at_rest, "cpu_s": cpu_ended - cpu_saved,
        }  # fmt: skip

    def close(self) -> None:
        self.side.close()
        self.stack.close()


def figures(turn: dict[str, Any]) -> dict[str, float]:
    """What one save cost."""
    before = [end for end in turn["ends"] if end <= 0]
    after = [before[-1], *(end for end in turn["ends"] if end > 0)]
    idle_step_s = (before[-1] - before[0]) / (len(before) - 1)
    count = len(after) - 1
    gaps = [(begin, end - begin) for begin, end in itertools.pairwise(after)]
    during = [gap for begin, gap in gaps if begin < turn["durable_s"]]
    lost_s = after[-1] - after[0] - count * idle_step_s
    return {
        "lost_s": lost_s,
        "over_idle": len(during) * idle_step_s / sum(during),
        "over_idle_10_s": 1 - lost_s / 10,
        "gap_ms": 1e3 * max(during),
        "idle_gap_ms": 1e3 * max(end - begin for begin, end in itertools.pairwise(before)),
        "idle_step_ms": 1e3 * idle_step_s,
        "held_ms": 1e3 * turn["held_s"],
        "durable_s": turn["durable_s"],
        "extra_cpu_s": turn["cpu_s"] - count * turn["step_cpu_s"] + turn["others_cpu_s"],
        "interval_s": max(100 * lost_s, turn["durable_s"]),
    }


def measure(mode: str, names: list[str], repeats: int, idle_s: float, model: tuple[int, int, int]) -> dict[str, Any]:
    """For each side its turns, the first save first; its memory; and what setting up took."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        trainers = {name: Apart(Trainer, name, root, mode, *model) for name in names}
        found: dict[str, Any] = {name: {"turns": []} for name in names}
        try:
            tensors, size_bytes = trainers[names[0]].call("sizes")
            before = {name: trainer.memory_bytes() for name, trainer in trainers.items()}
            for name, trainer in trainers.items():
                found[name]["set_up_s"] = trainer.call("open")
            for number in range(repeats + 1):
                for name, trainer in trainers.items():
                    cpu = trainer.cpu_s()["others"]
                    turn = trainer.call("turn", idle_s)
                    turn["others_cpu_s"] = trainer.cpu_s()["others"] - cpu
                    found[name]["turns"].append(turn)
                    shown = {part: round(value, 3) for part, value in figures(turn).items()}
                    print(f"{mode}, save {number + 1}, {name}: {shown}", file=sys.stderr)
            for name, trainer in trainers.items():
                idle = trainer.memory_bytes() - before[name]
                peak = trainer.memory_during("turn", 0.5) - before[name]
                found[name] |= {"idle_copies": idle / size_bytes, "saving_copies": peak / size_bytes}
                trainer.call("close")
        finally:
            for trainer in trainers.values():
                trainer.close()
    return {"tensors": tensors, "state_bytes": size_bytes, "sides": found}


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians of the saves after the first, for each side; DCP's best is the one that loses least."""
    sides = {}
    for name, found in measured["sides"].items():
        each = [figures(turn) for turn in found["turns"]]
        sides[name] = {part: median([of[part] for of in each[1:]]) for part in each[0]}
        sides[name] |= {
            "first_lost_s": each[0]["lost_s"], "first_durable_s": each[0]["durable_s"], "set_up_s": found["set_up_s"],
            "idle_copies": found["idle_copies"], "saving_copies": found["saving_copies"],
        }  # fmt: skip
    best = min((name for name in sides if name.startswith("dcp")), key=lambda name: sides[name]["lost_s"])
    return {"lost_ratio": sides[best]["lost_s"] / sides[OURS]["lost_s"], "dcp": best, "sides": sides}


def rate(turn: dict[str, Any], until_s: float) -> list[tuple[float, float]]:
    """Rate over idle in each `BIN_S` from one second before the save; a step counts in parts where it crosses bins."""
    ends = turn["ends"]
    edges = np.arange(-1.0, min(until_s, ends[-1]), BIN_S)
    done = np.diff(np.interp(edges, ends, np.arange(len(ends))))
    rates = done * figures(turn)["idle_step_ms"] / 1e3 / BIN_S
    return [(round(float(edge) + BIN_S / 2, 3), float(value)) for edge, value in zip(edges, rates, strict=False)]


def picture(path: Path, mode: str, measured: dict[str, Any], result: dict[str, Any]) -> None:
    """The first save, and the median of the later ones, ours beside DCP's."""
    names = list(dict.fromkeys([OURS, result["dcp"], "dcp thread"]))
    turns = {name: measured["sides"][name]["turns"] for name in names if name in measured["sides"]}
    until = 1 + max(turn["durable_s"] for of in turns.values() for turn in of[1:])
    first_until = 1 + max(of[0]["durable_s"] for of in turns.values())
    later = []
    for name, of in turns.items():
        values: dict[float, list[float]] = {}
        for turn in of[1:]:
            for x, y in rate(turn, until):
                values.setdefault(x, []).append(y)
        most = [(x, median(ys)) for x, ys in sorted(values.items()) if 2 * len(ys) >= len(of) - 1]
        later.append(Series(name, most))
    first = [Series(name, rate(of[0], first_until)) for name, of in turns.items()]
    x, y = "seconds since the save was called", "rate over idle"
    draw(path, [
        Panel(f"Later saves, {TITLES[mode]}: median", x, y, later),
        Panel(f"First save, {TITLES[mode]}", x, y, first),
    ])  # fmt: skip


def table(mode: str, result: dict[str, Any]) -> str:
    columns = {
        "lost_s": "lost s", "over_idle": "of idle", "over_idle_10_s": "in 10 s",
        "gap_ms": "gap ms", "idle_gap_ms": "idle gap ms", "held_ms": "held ms", "durable_s": "durable s",
        "extra_cpu_s": "CPU s", "interval_s": "1% interval s",
        "first_lost_s": "first: lost s", "first_durable_s": "durable s", "set_up_s": "set-up s",
        "idle_copies": "copies idle", "saving_copies": "saving",
    }  # fmt: skip
    lines = [f"| {mode} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, side in result["sides"].items():
        lines.append(f"| {name} | " + " | ".join(f"{side[part]:.3g}" for part in columns) + " |")
    return "\n".join(lines)


def main(modes: list[str], names: list[str], repeats: int, idle_s: float, model: Any, pictures: str | None) -> None:
    results, measured = {}, {}
    for mode in modes:
        measured[mode] = measure(mode, names, repeats, idle_s, model)
        results[mode] = summary(measured[mode])
        print(table(mode, results[mode]))
        if pictures:
            picture(Path(f"{pictures}-{mode}.svg"), mode, measured[mode], results[mode])
    lost, felt = results[modes[0]], results[modes[-1]]
    ours, dcp = felt["sides"][OURS], felt["sides"][felt["dcp"]]
    print(json.dumps({
        "ratios": {"lost_seconds_per_save": lost["lost_ratio"]},
        "ours_over_idle": ours["over_idle"], "dcp_over_idle": dcp["over_idle"],
        "ours_gap_ms": ours["gap_ms"], "dcp_gap_ms": dcp["gap_ms"], "idle_gap_ms": ours["idle_gap_ms"],
        "ours_host_copies": ours["saving_copies"], "dcp_host_copies": dcp["saving_copies"],
        "modes": results, "samples": measured, **environment(),
    }))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", default="shared,spare")
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle-s", type=float, default=3.0)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--picture")
    options = parser.parse_args()
    sizes = (options.layers, options.width, options.tokens)
    main(options.modes.split(","), options.sides.split(","), options.repeats, options.idle_s, sizes, options.picture)
