"""What the benchmarks compute from what they measured."""

from __future__ import annotations

import json
import xml.dom.minidom

import pytest

from benchmarks.checkpoint.pictures import Panel, Series, draw
from benchmarks.checkpoint.planning import extrapolate
from benchmarks.checkpoint.throughput import figures, rate


def turn(step_s, pause_s, durable_s):
    """Two seconds at rest, a save that holds training for `pause_s`, and steps on until a second after its end."""
    ends = [step_s * n for n in range(-round(2 / step_s), 1)]
    ends.append(pause_s + step_s)
    while ends[-1] < durable_s + 1:
        ends.append(ends[-1] + step_s)
    return {
        "ends": ends, "held_s": pause_s, "durable_s": durable_s,
        "step_cpu_s": step_s, "cpu_s": 5.0, "others_cpu_s": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("pause_s", [0.0, 0.3])
def test_lost_seconds_are_what_training_stood_still(pause_s):
    found = figures(turn(0.05, pause_s, durable_s=2.0))
    assert found["lost_s"] == pytest.approx(pause_s, abs=1e-9)
    assert found["gap_ms"] == pytest.approx(1e3 * (0.05 + pause_s))
    assert found["interval_s"] == pytest.approx(max(100 * pause_s, 2.0))


def test_half_the_rate_for_a_while_loses_half_of_that_while():
    ends = [0.1 * n for n in range(-20, 1)] + [0.2 * n for n in range(1, 11)] + [2 + 0.1 * n for n in range(1, 11)]
    slow = {"ends": ends, "held_s": 0, "durable_s": 2.0, "step_cpu_s": 0.1, "cpu_s": 2.0, "others_cpu_s": 0.5}
    found = figures(slow)
    assert found["lost_s"] == pytest.approx(1.0)
    assert found["over_idle"] == pytest.approx(0.5)
    assert found["extra_cpu_s"] == pytest.approx(0.5)
    drawn = dict(rate(slow, 3.0))
    assert drawn[-0.55] == pytest.approx(1.0)
    assert drawn[1.05] == pytest.approx(0.5)


def test_what_is_not_measured_continues_the_line_and_says_so():
    curve = [
        {"ranks": ranks, "dcp_first_s": 2.0 * ranks, "dcp_every_save_s": 1.0, "dcp_every_save_bytes": 8 * ranks,
         "dcp_metadata_bytes": 4} for ranks in (64, 256)
    ] + [{"ranks": 1856}]  # fmt: skip
    extrapolate(curve)
    assert curve[2]["dcp_first_s"] == pytest.approx(2.0 * 1856)
    assert curve[2]["dcp_every_save_s"] == pytest.approx(1.0)
    assert [point.get("dcp_extrapolated", False) for point in curve] == [False, False, True]


def test_a_picture_is_an_svg_with_every_line_and_no_markup_from_names(tmp_path):
    lines = [Series("a < b", [(0.0, 1.0), (1.0, 0.5)]), Series("c", [(0.0, 0.2), (1.0, 0.4)])]
    draw(tmp_path / "p.svg", [Panel("one", "x", "y", lines), Panel("two", "x", "y", lines)])
    drawn = xml.dom.minidom.parse(str(tmp_path / "p.svg"))
    assert len(drawn.getElementsByTagName("polyline")) == 4
    assert "a < b" in json.dumps([node.firstChild.data for node in drawn.getElementsByTagName("text")])
