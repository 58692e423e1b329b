"""kill -9 at random moments, from outside, and the same command again: the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import hashlib, json, sys, torch
torch.set_num_threads(1)
from stillroom.models import load
from stillroom.schema import Example, Message, Target
from stillroom.teacher import LiveTeacher
from stillroom.training import TrainConfig, train
from tests.training.test_objective import another

student, work, settings = sys.argv[1:]
loaded = load(student, chat_template="chatml-tools")
answer = lambda i: (Target(Message("assistant", f"answer {i} " * 3), "teacher"),)
data = [Example(f"e{i}", (Message("user", f"question {i}"),), (), answer(i)) for i in range(40)]
settings, teacher = json.loads(settings), None
if "objective" in settings:
    other = load(student, chat_template="chatml-tools")
    other.model = another(other.model)
    teacher = LiveTeacher(other)
config = TrainConfig(epochs=6, tokens_per_step=300, learning_rate=5e-3, save_every_steps=2, **settings)
print("ready", flush=True)
train(loaded, data, config, work, teacher=teacher)
weights = b"".join(p.detach().numpy().tobytes() for p in loaded.model.parameters())
print(hashlib.sha256(weights).hexdigest())
"""


ON_POLICY = {
    "objective": {"kind": "reverse_kl"},
    "on_policy": {"probability": 0.6, "max_tokens": 6, "replay": 20, "replay_share": 0.4, "teacher_share": 0.2},
}


def start(student: Path, work: Path, settings: dict) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(student), str(work), json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


@pytest.mark.parametrize("settings", [{}, ON_POLICY], ids=["given answers", "on-policy"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bits(tiny_student, tmp_path, kills, settings):
    with start(tiny_student, tmp_path / "undisturbed", settings) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        wanted = process.stdout.readline().strip()
        duration = time.monotonic() - began
    assert len(wanted) == len(hashlib.sha256().hexdigest())

    draw, landed = random.Random(kills), 0
    for number in range(kills):
        behind = {"save_behind": number % 2 == 0}
        with start(tiny_student, tmp_path / "killed", settings | behind) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, duration / min(4, kills)))
            landed += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert landed  # a kill that comes too late tests nothing
    with start(tiny_student, tmp_path / "killed", settings) as process:
        assert process.stdout is not None
        assert process.stdout.read().split()[-1] == wanted
