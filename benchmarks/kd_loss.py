"""How fast, and in how much memory, are a distillation loss and its gradient beside TRL's and Liger's?

    python -m benchmarks.kd_loss            # 2,048 rows, both vocabularies, three betas; 8 minutes on two cores
    python -m benchmarks.kd_loss --full     # 2,048, 8,192 and 32,768 rows; an hour, and `oom` where it does not fit

Same hidden states, heads, rows and beta (0 forward KL, 1 reverse KL, between them generalised JSD), all in fp32 at
hidden size 576; only scored rows exist. Each sample is a fresh process that projects with both heads, takes the loss
and computes the gradients of the student's hidden states and head, once, after a warm-up on a few rows. Samples of
all sides take turns, each round begun by another: memory that a virtual machine touches first is slow. Before any
timing, every side's loss and gradients are compared with autograd in fp64.

Peers: TRL's `DistillationTrainer` (chunked), TRL's experimental `GKDTrainer` (dense), Liger's fused linear JSD where
it runs. Time is compared with the leanest peer whose gradients are right, dense time stands beside it.

Peak: the process's high-water mark above what it held with its inputs made. Floor: gradient of the head, gradient
of the hidden states and one chunk of the student's logits; the teacher's logits are not counted in the floor.

Liger's chunked losses are plain PyTorch and import without triton: `pip install --no-deps liger-kernel` has them
measured too, otherwise the output says that they are absent.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

HIDDEN = 576
ROWS = (2_048, 8_192, 32_768)
VOCABULARIES = (49_152, 151_936)
BETAS = (0.0, 0.5, 1.0)
OURS, TRL, GKD, LIGER = "stillroom", "TRL DistillationTrainer", "TRL GKDTrainer", "Liger"
SIDES = (OURS, TRL, GKD, LIGER)
CHECKED = {"rows": 48, "vocabulary": 40_000}
"""Where gradients are compared with fp64: several of TRL's vocabulary tiles, and a fraction of a second."""

Side = Callable[[dict[str, Any], float], float]
"""Computes the mean loss of inputs at a beta, and leaves gradients in `hidden.grad` and `head.grad`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every number of rows; five rounds")
    parser.add_argument("--rows", type=int, action="append", help="only this many rows (repeatable)")
    parser.add_argument("--vocabulary", type=int, action="append", help="only this vocabulary (repeatable)")
    parser.add_argument("--beta", type=float, action="append", help="only this beta (repeatable)")
    parser.add_argument("--rounds", type=int, help="samples of ours and the leanest peer (3; 5 with --full)")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.full else 3)
    right, notes = check()
    rows = []
    for count in arguments.rows or (ROWS if arguments.full else ROWS[:1]):
        for vocabulary in arguments.vocabulary or VOCABULARIES:
            for beta in arguments.beta or BETAS:
                rows.append(compare(count, vocabulary, beta, right, rounds, arguments.full))
    print(json.dumps({"ratios": ratios(rows), "rows": rows, "checked": notes, **environment()}))


def check() -> tuple[list[str], dict[str, Any]]:
    """The sides whose loss and gradients equal fp64's at every beta, and by how much each differs or why it fails."""
    notes: dict[str, Any] = {}
    for side in SIDES:
        notes[side] = {str(beta): in_fresh_process(difference, side, beta) for beta in BETAS}
        print(f"{side}: {notes[side]}", flush=True)
    right = [side for side in SIDES if all(max(found.get("relative", [1])) < 1e-5 for found in notes[side].values())]
    assert OURS in right, notes[OURS]
    return right, notes


def compare(count: int, vocabulary: int, beta: float, right: list[str], rounds: int, full: bool) -> dict[str, Any]:
    """One row of the table: samples of every right side in turn; the dense one once by default."""
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in right}
    for turn in range(rounds):
        for side in (*right[turn % len(right) :], *right[: turn % len(right)]):
            ended = samples[side] and "oom" in samples[side][-1]
            if not ended and (turn == 0 or full or side != GKD):
                samples[side].append(in_fresh_process(measure, side, count, vocabulary, beta))
    summary = {side: summarise(found) for side, found in samples.items()}
    row = {"rows": count, "vocabulary": vocabulary, "beta": beta, **compared(summary, count, vocabulary)}
    row["sides"] = summary
    print(json.dumps(row), flush=True)
    return row


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    if "oom" in samples[-1]:
        return {"oom": samples[-1]["oom"]}
    seconds = [sample["seconds"] for sample in samples]
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": max(sample["peak_bytes"] for sample in samples),
        "samples_s": seconds,
        "samples_bytes": [sample["peak_bytes"] for sample in samples],
    }


def compared(summary: dict[str, Any], count: int, vocabulary: int) -> dict[str, Any]:
    """Ours beside the floor, the leanest right peer and the dense one; None where there is nothing to compare with."""
    import torch

    from stillroom.models.distilling import fitting_rows

    ours = summary[OURS]
    chunk = fitting_rows(count, vocabulary, torch.device("cpu"))
    floor = 4 * (vocabulary * HIDDEN + count * HIDDEN + chunk * vocabulary)
    peers = {side: found for side, found in summary.items() if side != OURS and "oom" not in found}
    dense = peers.get(GKD)
    leanest = min(peers, key=lambda side: peers[side]["peak_bytes"]) if peers else None
    return {
        "memory_over_floor": ours["peak_bytes"] / floor,
        "memory_over_dense": ours["peak_bytes"] / dense["peak_bytes"] if dense else None,
        "time": peers[leanest]["seconds"] / ours["seconds"] if leanest else None,
        "peer": leanest,
        "time_of_dense": dense["seconds"] / ours["seconds"] if dense else None,
        "seconds": ours["seconds"],
        "peak_bytes": ours["peak_bytes"],
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    times = [row["time"] for row in rows if row["time"]]
    return {
        "memory_over_floor": max(row["memory_over_floor"] for row in rows),
        "memory_over_dense": max((row["memory_over_dense"] for row in rows if row["memory_over_dense"]), default=1.0),
        "time": statistics.median(times) if times else 0.0,
        "time_worst": min(times, default=0.0),
    }


def in_fresh_process(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The result of `function` in a process forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "stillroom.models.distilling", *_TRL_MODULES])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        found = {"oom": f"killed, exit code {process.exitcode}"}
    process.join()
    return found


_TRL_MODULES = ("trl.trainer.distillation_trainer", "trl.experimental.gkd.gkd_trainer")


def _answer(sender: Any, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def measure(side: str, count: int, vocabulary: int, beta: float) -> dict[str, Any]:
    """Seconds and peak bytes of one loss with its gradients."""
    run = _sides()[side]
    run(inputs(64, 1_000), beta)
    data = inputs(count, vocabulary)
    _limit_memory()
    before = _reset_peak()
    started = time.perf_counter()
    try:
        run(data, beta)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return {"oom": str(error).splitlines()[0]}
    return {"seconds": time.perf_counter() - started, "peak_bytes": _status_bytes("VmHWM") - before}


def difference(side: str, beta: float) -> dict[str, Any]:
    """Relative differences of loss and of both gradients (by norm) from autograd in fp64, or why there are none."""
    import torch

    data = inputs(**CHECKED)
    p = torch.softmax(data["teacher_hidden"].double() @ data["teacher_head"].double().T, -1)
    hidden, head = (data[name].detach().double().requires_grad_(True) for name in ("hidden", "head"))
    q = torch.softmax(hidden @ head.T, -1)
    m = beta * p + (1 - beta) * q
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1).mean()  # noqa: E731
    wanted = kl(p, q) if beta == 0 else kl(q, p) if beta == 1 else beta * kl(p, m) + (1 - beta) * kl(q, m)
    wanted.backward()
    try:
        loss = _sides()[side](data, beta)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    pairs = ((data["hidden"].grad, hidden.grad), (data["head"].grad, head.grad))
    gradients = [float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs]
    return {"relative": [abs(loss / wanted.item() - 1), *gradients]}


def inputs(rows: int, vocabulary: int) -> dict[str, Any]:
    """Hidden states and heads whose logits have a standard deviation of 2."""
    import torch

    random = torch.Generator().manual_seed(0)
    data = {
        "hidden": torch.randn(rows, HIDDEN, generator=random),
        "head": torch.randn(vocabulary, HIDDEN, generator=random).mul_(2 / HIDDEN**0.5),
        "teacher_hidden": torch.randn(rows, HIDDEN, generator=random),
        "teacher_head": torch.randn(vocabulary, HIDDEN, generator=random).mul_(2 / HIDDEN**0.5),
    }
    for name in ("hidden", "head"):
        data[name].requires_grad_(True)
    return data


def _sides() -> dict[str, Side]:
    return {OURS: _ours, TRL: _trl_chunked, GKD: _trl_dense, LIGER: _liger}


def _ours(data: dict[str, Any], beta: float) -> float:
    from functools import partial

    import torch

    from stillroom.models.distilling import Blend, distil
    from stillroom.models.divergences import generalised_jsd
    from stillroom.models.precision import Precision
    from stillroom.models.products import Products
    from stillroom.models.signals import Projected

    products = Products(Precision("fp32", True, "measured in fp32"))
    hidden, labels = data["hidden"], torch.zeros(len(data["hidden"]), dtype=torch.long)
    teacher = Projected(data["teacher_hidden"], data["teacher_head"], products)
    blend = Blend(((1.0, partial(generalised_jsd, beta=beta)),))
    loss, hidden.grad = distil(hidden.detach(), data["head"], labels, teacher, blend, products, scale=1 / len(hidden))
    return float(loss.detach())


def _trl_chunked(data: dict[str, Any], beta: float) -> float:
    import torch
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden = data["hidden"][None]
    mask = torch.ones(hidden.shape[:2], dtype=torch.long)
    loss, _, _ = _chunked_divergence_loss(
        hidden, data["teacher_hidden"][None], data["head"], data["teacher_head"], mask, beta
    )
    loss.backward()
    return float(loss.detach())


def _trl_dense(data: dict[str, Any], beta: float) -> float:
    import torch
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student = data["hidden"][None] @ data["head"].T
    with torch.no_grad():
        teacher = data["teacher_hidden"][None] @ data["teacher_head"].T
    loss = GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, num_items_in_batch=len(data["hidden"]))
    loss.backward()
    return float(loss.detach())


def _liger(data: dict[str, Any], beta: float) -> float:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    labels = torch.zeros(len(data["hidden"]), dtype=torch.long)
    loss = loss_of(data["hidden"], data["head"], data["teacher_hidden"], data["teacher_head"], labels)
    loss.backward()
    return float(loss.detach())


def _limit_memory() -> None:
    """Refuse to allocate more than is available now, instead of having this machine's processes killed."""
    limit = _status_bytes("VmSize") + int(0.9 * _field_bytes("/proc/meminfo", "MemAvailable"))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reset_peak() -> int:
    """Forget the high-water mark so far; the bytes resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    return _field_bytes("/proc/self/status", field)


def _field_bytes(path: str, field: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def environment() -> dict[str, Any]:
    import torch

    versions = {}
    for package in ("torch", "trl", "liger-kernel"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {"threads": torch.get_num_threads(), "cpu": platform.processor() or platform.machine(), "versions": versions}


if __name__ == "__main__":
    main()
