"""What a Spectrum scan found, for people: a table in text, and a map of layers by kind as one SVG file.

FOLDER/<digest>.json         the scores, kept by the digest of the weights
FOLDER/<digest>-top25.svg    the map
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from stillroom.models.loading import weight_files, weights_digest
from stillroom.models.spectrum import MatrixScore, cached_scan, stored_matrices, strongest
from stillroom.storage import write_atomic

CELL, LEFT, TOP = 18, 150, 34
"""Pixels: side of a cell, room for the kinds' names, room for the title."""

STYLE = """
text { font: 11px system-ui, sans-serif; fill: #333 } .title { font-size: 13px; font-weight: 600 }
rect { fill: #1f6f8b } .chosen { stroke: #d1495b; stroke-width: 2 }
@media (prefers-color-scheme: dark) { text { fill: #ddd } rect { fill: #5fb7d4 } }
"""


def write_spectrum(source: str | Path, top: float, folder: str | Path) -> dict[str, Any]:
    """Scan the model at `source` unless `folder` has its scores, draw the map, and say what was found.

    Raises:
        ModelError: nothing there that can be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest = weights_digest(weight_files(source))
    scores = cached_scan(folder / f"{digest[:16]}.json", digest, stored_matrices(source))
    chosen = strongest(scores, top)
    drawing = folder / f"{digest[:16]}-top{top:g}.svg"
    title = f"{Path(source).name}: signal-to-noise by layer, the top {top:g}% of each kind framed"
    write_atomic(drawing, picture(scores, chosen, title))
    return {
        "table": table(scores, chosen),
        "model": str(source),
        "digest": digest,
        "top": top,
        "matrices": len(scores),
        "chosen": [score.name for score in chosen],
        "scores": str(folder / f"{digest[:16]}.json"),
        "picture": str(drawing),
    }


def table(scores: Sequence[MatrixScore], chosen: Sequence[MatrixScore]) -> str:
    """A line per kind: how many matrices, which layers are chosen, and the scores' range."""
    picked = {score.name for score in chosen}
    lines = [f"{'kind':<22}{'matrices':>9}{'best':>11}{'median':>11}{'worst':>11}  chosen layers"]
    for kind, alike in by_kind(scores).items():
        values = [_value(score) for score in alike]
        figures = (max(values), statistics.median(values), min(values))
        layers = ranges(score.layer for score in alike if score.name in picked)
        lines.append(f"{kind:<22}{len(alike):>9}" + "".join(f"{figure:>11.4g}" for figure in figures) + f"  {layers}")
    return "\n".join(lines)


def picture(scores: Sequence[MatrixScore], chosen: Sequence[MatrixScore], title: str) -> str:
    """An SVG: a row per kind, a column per layer, darker the higher its rank within its kind, chosen ones framed."""
    picked, kinds = {score.name for score in chosen}, by_kind(scores)
    columns = max((score.layer for score in scores), default=0) + 1
    width, height = LEFT + CELL * columns + 10, TOP + CELL * len(kinds) + 26
    parts = [f'<text class="title" x="8" y="20">{escape(title)}</text>']
    for row, (kind, alike) in enumerate(kinds.items()):
        y = TOP + CELL * row
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(kind)}</text>')
        ranked = sorted(alike, key=_value)
        for rank, score in enumerate(ranked, start=1):
            css = ' class="chosen"' if score.name in picked else ""
            hint = f"{score.name}: score {_value(score):.4g}"
            parts.append(
                f'<rect{css} x="{LEFT + CELL * score.layer + 2}" y="{y + 2}" width="{CELL - 4}" height="{CELL - 4}" '
                f'fill-opacity="{rank / len(ranked):.2f}"><title>{escape(hint)}</title></rect>'
            )
    for layer in range(0, columns, 5):
        parts.append(f'<text x="{LEFT + CELL * layer + 3}" y="{height - 10}">{layer}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    return f"{head}<title>{escape(title)}</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"


def by_kind(scores: Iterable[MatrixScore]) -> dict[str, list[MatrixScore]]:
    """Scores by kind of matrix, kinds in alphabetical order."""
    found: dict[str, list[MatrixScore]] = {}
    for score in sorted(scores, key=lambda score: (score.kind, score.layer)):
        found.setdefault(score.kind, []).append(score)
    return found


def ranges(layers: Iterable[int]) -> str:
    """Layers as people write them, `0-2, 7`."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _value(score: MatrixScore) -> float:
    return math.inf if score.score is None else score.score
