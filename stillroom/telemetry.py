"""Progress and metrics: one call, many sinks.

`progress` draws a rich bar on stderr where that is a terminal, and prints a plain line every few
seconds where it is not. `Metrics` appends JSON lines (and TensorBoard events where installed).
Nothing here writes to stdout: that belongs to results.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

PLAIN_EVERY_S = 5.0


class Progress:
    """What `progress` yields: call `advance` as work is done; the numbers given by name are shown beside the bar."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0.0
        self.started = time.monotonic()
        self.fields: dict[str, Any] = {}

    def advance(self, by: float = 1, **fields: Any) -> None:
        """Add `by` units done; `fields` such as `loss=0.4` replace earlier ones of the same name."""
        self.done += by
        self.fields |= fields
        self._show()

    def _show(self) -> None:
        raise NotImplementedError

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(1e-9, time.monotonic() - self.started)

    def _details(self) -> str:
        return "  ".join(f"{name} {_short(value)}" for name, value in self.fields.items())


class _Plain(Progress):
    _last = 0.0

    def _show(self, *, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - max(self._last, self.started) < PLAIN_EVERY_S:
            return
        self._last = now
        of = f"/{_short(self.total)}" if self.total else ""
        left = (
            f"  {_clock((self.total - self.done) / self.rate)} left" if self.total and self.done and not final else ""
        )
        spent = f"  {_clock(now - self.started)}" if final else ""
        line = (
            f"{self.label}: {_short(self.done)}{of} {self.unit}  {_short(self.rate)}/s{left}{spent}  {self._details()}"
        )
        print(line.rstrip(), file=sys.stderr, flush=True)


class _Bar(Progress):
    def __init__(self, label: str, total: float | None, unit: str) -> None:
        super().__init__(label, total, unit)
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichProgress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[details]}"),
            console=Console(stderr=True),
        )
        self._task = self._rich.add_task(label, total=total, counts="", details="")

    def _show(self) -> None:
        of = f"/{_short(self.total)}" if self.total else ""
        counts = f"{_short(self.done)}{of} {self.unit} ({_short(self.rate)}/s)"
        self._rich.update(self._task, completed=self.done, counts=counts, details=self._details())


@contextlib.contextmanager
def progress(label: str, total: float | None = None, unit: str = "items") -> Iterator[Progress]:
    """Show how far `label` is, with its rate and the time left, until the block ends."""
    if sys.stderr.isatty():
        bar = _Bar(label, total, unit)
        with bar._rich:
            yield bar
    else:
        plain = _Plain(label, total, unit)
        yield plain
        plain._show(final=True)


def note(text: str) -> None:
    """One line for the person watching, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Metrics:
    """Numbers by step, appended to `metrics.jsonl` in a folder, and to TensorBoard where it is installed."""

    def __init__(self, folder: str | Path, *, tensorboard: bool = True) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(Path(folder) / "tensorboard"))

    def log(self, step: int, **values: float) -> None:
        """Record `values` at `step`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02d}"
    )
