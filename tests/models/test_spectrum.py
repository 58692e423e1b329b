"""Spectrum's scores against the formula written out in numpy; files read one matrix at a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from stillroom.errors import ModelError
from stillroom.models import export
from stillroom.models.spectrum import (
    MatrixScore,
    cached_scan,
    layer_matrices,
    scan,
    snr_of,
    stored_matrices,
    strongest,
)
from stillroom.models.spectrum_view import picture, ranges, table
from tests.models.test_pruning import teacher_of


def formula(weight: np.ndarray) -> tuple[float, float]:
    """Section 3 of arXiv:2406.06623, by a full decomposition."""
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    epsilon = sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    snr = values[values > epsilon].sum() / values[values <= epsilon].sum()
    return snr, snr / values[0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(4, 70), columns=st.integers(4, 70), rank=st.integers(0, 6),
    scale=st.sampled_from([1e-4, 1.0, 1e3]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_scores_are_those_of_the_formula(rows, columns, rank, scale, seed):
    draw = np.random.default_rng(seed)
    signal = draw.normal(size=(rows, rank)) @ draw.normal(size=(rank, columns))
    weight = (scale * (draw.normal(size=(rows, columns)) + signal)).astype(np.float32)
    values = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    sigma = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349
    bound = sigma * (1 + math.sqrt(min(weight.shape) / max(weight.shape)))
    if (values > bound).all() or np.abs(values - bound).min() < 1e-6 * values[0]:
        return  # infinite, or a rounding error decides
    assert snr_of(torch.from_numpy(weight)) == pytest.approx(formula(weight), rel=1e-6)


def test_a_matrix_without_noise_is_infinite_and_an_empty_one_says_nothing():
    assert snr_of(torch.eye(5)) == (math.inf, math.inf)
    assert snr_of(torch.zeros(4, 7)) == (0.0, 0.0)
    (only,) = scan([("model.layers.0.mlp.up_proj.weight", torch.eye(3))])
    assert only.score is None
    assert json.dumps(only.score) == "null"


def test_the_best_of_each_kind_are_chosen_rounded_up():
    scores = [
        MatrixScore(f"{kind}{i}", i, kind, (1, 1), 1.0, s) for kind in "ab" for i, s in enumerate((1.0, 3.0, None))
    ]
    assert [score.name for score in strongest(scores, 1)] == ["a2", "b2"]
    assert [score.name for score in strongest(scores, 34)] == ["a1", "a2", "b1", "b2"]
    assert strongest(scores, 100) == scores
    assert strongest(scores[:1] * 2, 50) == scores[:1] * 2


def test_files_and_memory_give_the_same_scores(tmp_path):
    loaded = teacher_of(layers=2)
    wanted = {score.name: score for score in scan(layer_matrices(loaded.model))}
    assert len(wanted) == 2 * 7
    export(loaded, tmp_path, dtype="float32", gguf_type="F32")
    for source in (tmp_path, tmp_path / "student.F32.gguf"):
        found = {score.name: score for score in scan(stored_matrices(source))}
        assert found.keys() == wanted.keys()
        for name, score in found.items():
            assert (score.layer, score.kind, score.shape) == (wanted[name].layer, wanted[name].kind, wanted[name].shape)
            assert (score.snr, score.score) == pytest.approx((wanted[name].snr, wanted[name].score), rel=1e-6)


def test_a_matrix_is_scored_before_the_next_one_is_read(tmp_path):
    """So no more than one is ever in memory: the second one's bytes are not even there."""
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(40, 30) for i in range(2)}
    matrices = iter(weights.items())
    first = next(scan(matrices))
    assert first.layer == 0
    assert next(matrices)[0] == "model.layers.1.mlp.up_proj.weight"

    save_file(weights, tmp_path / "model.safetensors")
    stored = stored_matrices(tmp_path)
    assert next(stored)[0] == "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        (tmp_path / "empty").mkdir()
        next(stored_matrices(tmp_path / "empty"))


def test_memory_stays_at_one_matrix_however_many_there_are(tmp_path):
    for count in (2, 16):
        folder = tmp_path / str(count)
        folder.mkdir()
        weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(256, 4096) for i in range(count)}
        save_file(weights, folder / "model.safetensors")
    # Anonymous memory: pages of the mapped file may be dropped at any time and do not count.
    code = """
import sys
from stillroom.models.spectrum import scan, stored_matrices
peak = 0
for score in scan(stored_matrices(sys.argv[1])):
    peak = max(peak, *(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")))
print(peak)
"""

    def run(count):
        return int(
            subprocess.run([sys.executable, "-c", code, str(tmp_path / count)], capture_output=True, check=True).stdout
        )

    few, many = run("2"), run("16")
    assert many - few < 2 * 256 * 4096 * 8 / 1024  # two unpacked matrices in fp64, where 14 more were read


def test_scores_are_kept_for_the_weights_that_they_are_of(tmp_path):
    matrices = [("model.layers.0.mlp.up_proj.weight", torch.randn(8, 8))]
    path = tmp_path / "scores.json"
    first = cached_scan(path, "a", matrices)
    assert cached_scan(path, "a", iter(())) == first  # nothing is read again
    assert cached_scan(path, "b", iter(())) == []


def test_the_command_prints_a_table_draws_a_map_and_ends_in_json(tiny_student, tmp_path):
    command = [sys.executable, "-m", "stillroom", "spectrum", tiny_student, "--top", "50", "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["matrices"] == 14
    assert len(found["chosen"]) == 7
    assert "self_attn.q_proj" in done.stdout
    root = ElementTree.parse(found["picture"]).getroot()
    cells = root.findall("{http://www.w3.org/2000/svg}rect")
    assert len(cells) == 14
    assert sum(cell.get("class") == "chosen" for cell in cells) == 7
    again = subprocess.run([*map(str, command), "--top", "100"], capture_output=True, text=True)
    assert len(json.loads(again.stdout.splitlines()[-1])["chosen"]) == 14
    assert "spectrum:" not in again.stderr  # the scores were kept


def test_what_is_shown_is_escaped_and_ranges_are_short():
    assert ranges([4, 0, 1, 2, 7, 8]) == "0-2, 4, 7-8"
    odd = MatrixScore("model.layers.0.<b>.weight", 0, "<b>", (1, 1), None, None)
    ElementTree.fromstring(picture([odd], [odd], 'a "title" & <more>'))
    assert "inf" in table([odd], [])
