"""Spectrum: which weight matrices carry signal, read off their singular values, one matrix in memory at a time.

    scores = cached_scan("spectrum.json", digest, stored_matrices("model/"))
    chosen = strongest(scores, top=25)

Per matrix, with singular values S: sigma = IQR(S) / 1.349, epsilon = sigma (1 + sqrt(min / max of its sides)),
SNR = sum S[S > epsilon] / sum S[S <= epsilon], score = SNR / S_0. Matrices are ranked within their kind only.

Source: Hartford et al. 2024, arXiv:2406.06623, sections 3.1 and 3.2; the bound is Marchenko and Pastur's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.models import gguf_layout
from stillroom.models.gguf_file import read_gguf
from stillroom.models.loading import weight_files
from stillroom.storage import write_atomic
from stillroom.telemetry import progress

IQR_PER_SIGMA = 1.349
"""The interquartile range of a normal distribution of unit variance."""

_MATRIX = re.compile(r"(?:.*\.)?(?:layers|h|blk)\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True, slots=True)
class MatrixScore:
    """One weight matrix: its layer, its kind (`mlp.up_proj`), its name and shape; None is infinity: no noise at all."""

    name: str
    layer: int
    kind: str
    shape: tuple[int, int]
    snr: float | None
    score: float | None


def snr_of(weight_OI: Tensor) -> tuple[float, float]:
    """SNR and score of one matrix; infinite where no singular value lies under the bound.

    Singular values are the roots of the Gram matrix's eigenvalues, in fp64: several times faster than a
    decomposition in fp32, and as exact wherever a value is more than 1e-8 of the largest.
    """
    wide = weight_OI.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp_(min=0).sqrt_()
    quarters = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=values.dtype, device=values.device))
    sigma = float(quarters[1] - quarters[0]) / IQR_PER_SIGMA
    bound = sigma * (1 + math.sqrt(min(weight_OI.shape) / max(weight_OI.shape)))
    signal, noise = float(values[values > bound].sum()), float(values[values <= bound].sum())
    largest = float(values[-1])
    if not largest:
        return 0.0, 0.0  # an empty matrix says nothing
    snr = signal / noise if noise else math.inf
    return snr, snr / largest


def scan(matrices: Iterable[tuple[str, Tensor]]) -> Iterator[MatrixScore]:
    """Scores in the order of `matrices`, each before the next one is read; those outside layers are passed over."""
    for name, weight in matrices:
        found = _MATRIX.fullmatch(name)
        if found is None or weight.dim() != 2:
            continue
        snr, score = (value if math.isfinite(value) else None for value in snr_of(weight))
        rows, columns = weight.shape
        yield MatrixScore(name, int(found[1]), found[2], (rows, columns), snr, score)


def cached_scan(path: str | Path, digest: str, matrices: Iterable[tuple[str, Tensor]]) -> list[MatrixScore]:
    """The scores that `path` holds for weights of this digest; scanned and written there if it holds none."""
    path = Path(path)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["digest"] == digest:
            return [MatrixScore(**entry | {"shape": tuple(entry["shape"])}) for entry in stored["scores"]]
    scores = []
    with progress("spectrum", unit="matrices") as bar:
        for score in scan(matrices):
            scores.append(score)
            bar.advance(1)
    write_atomic(path, json.dumps({"digest": digest, "scores": [asdict(score) for score in scores]}))
    return scores


def strongest(scores: Sequence[MatrixScore], top: float) -> list[MatrixScore]:
    """Of each kind the best `top` percent, rounded up, in the order of `scores`; of equals the lower layer."""
    by_kind: dict[str, list[MatrixScore]] = {}
    for score in scores:
        by_kind.setdefault(score.kind, []).append(score)
    chosen = set()
    for alike in by_kind.values():
        ranked = sorted(alike, key=lambda s: (-(math.inf if s.score is None else s.score), s.layer, s.name))
        chosen |= {s.name for s in ranked[: math.ceil(len(alike) * top / 100)]}
    return [score for score in scores if score.name in chosen]


def layer_matrices(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weight matrices of a model's layers, by name."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and _MATRIX.fullmatch(name):
            yield name, parameter.detach()


def stored_matrices(source: str | Path) -> Iterator[tuple[str, Tensor]]:
    """The same from files, read one at a time; a GGUF's names become those of Transformers.

    Raises:
        ModelError: as `load`.
    """
    for path in weight_files(source):
        yield from _gguf_matrices(path) if path.suffix == ".gguf" else _safetensors_matrices(path)


def _safetensors_matrices(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in sorted(file.keys(), key=_by_layer):
            if _MATRIX.fullmatch(name) and len(file.get_slice(name).get_shape()) == 2:
                yield name, file.get_tensor(name)


def _gguf_matrices(path: Path) -> Iterator[tuple[str, Tensor]]:
    file = read_gguf(path)
    known = {theirs: ours for ours, theirs in gguf_layout.LAYER.items()}
    for name in sorted(file.tensors, key=_by_layer):
        found = _MATRIX.fullmatch(name)
        if found and len(file.tensors[name].shape) == 2:
            # Rows of queries and keys stand in another order there, which leaves singular values as they are.
            yield f"model.layers.{found[1]}.{known.get(found[2], found[2])}.weight", torch.from_numpy(file.tensor(name))


def _by_layer(name: str) -> tuple[int, str]:
    found = _MATRIX.fullmatch(name)
    return (int(found[1]) if found else -1, name)
