"""Progress goes to stderr as plain lines where there is no terminal; metrics are JSON lines."""

from __future__ import annotations

import json

from stillroom import telemetry


def test_progress_without_a_terminal_is_plain_lines_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(telemetry, "PLAIN_EVERY_S", 0.0)
    with telemetry.progress("train", 4, "steps") as bar:
        for step in range(4):
            bar.advance(loss=1.0 / (step + 1))
    out, err = capsys.readouterr()
    assert out == ""
    assert "train: 4/4 steps" in err.splitlines()[-1]
    assert "loss 0.25" in err
    assert "left" in err.splitlines()[0]
    assert "\x1b" not in err


def test_metrics_are_appended_by_step(tmp_path):
    for step in (1, 2):
        with telemetry.Metrics(tmp_path, tensorboard=False) as metrics:
            metrics.log(step, loss=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
