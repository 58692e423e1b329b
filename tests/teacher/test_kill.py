"""kill -9 of labelling at any moment: what was stored is never asked for again, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from stillroom.testing import LocalTeacher

PROMPTS = 60

LABEL = """
import json, sys
from stillroom.engines import AnswerCache, open_model
from stillroom.schema import Example, Message, ToolSpec, to_dict
from stillroom.teacher import TeacherConfig, label

url, cache, out = sys.argv[1:4]
tool = ToolSpec("add", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
examples = [Example(str(index), (Message("user", f"question {index}"),), (tool,)) for index in range(int(sys.argv[4]))]
config = TeacherConfig.model_validate(
    {"model": {"engine": "openai", "url": url, "model": "any"}, "concurrency": 4, "retry": {"base_s": 0.01}})
with open_model(config.model) as model, AnswerCache(cache) as answers:
    labelled, report = label(examples, model, config, answers)
json.dump([to_dict(example) for example in labelled], open(out, "w"))
"""


def answer(body: dict) -> str:
    return f"[add(a={body['messages'][-1]['content'].split()[-1]})]"


def start(teacher, tmp_path, out="out.json"):
    command = [sys.executable, "-c", LABEL, teacher.url, str(tmp_path / "cache"), str(tmp_path / out), str(PROMPTS)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def stored(tmp_path) -> set[str]:
    """The prompts whose answers lie whole in the cache, read without our own reader."""
    path = tmp_path / "cache" / "answers.jsonl"
    found = set()
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.add(json.loads(line)["prompt"])
        except ValueError:
            continue  # torn by the kill
    return found


def kill_somewhere(process, teacher, after: int) -> None:
    """kill -9 once the teacher has been asked `after` questions more."""
    wanted = sum(teacher.calls().values()) + after
    while process.poll() is None and sum(teacher.calls().values()) < wanted:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_no_prompt_is_asked_twice_after_its_answer_was_stored(tmp_path, kills):
    dice = random.Random(kills)
    with LocalTeacher(answer, log=tmp_path / "calls.jsonl", delay_s=0.002, fail_first=2, retry_after="0.01") as teacher:
        for _ in range(kills):
            process = start(teacher, tmp_path)
            kill_somewhere(process, teacher, dice.randrange(1, max(2, PROMPTS // kills)))
            kept, asked = stored(tmp_path), teacher.calls()
            # What was stored by now must never be asked for again.
            assert all(asked[prompt] >= 1 for prompt in kept)
            before = {prompt: asked[prompt] for prompt in kept}
            check = start(teacher, tmp_path, "check.json")
            kill_somewhere(check, teacher, 1)
            assert {prompt: teacher.calls()[prompt] for prompt in kept} == before
        assert start(teacher, tmp_path).wait() == 0
        kept = stored(tmp_path)
        assert len(kept) == PROMPTS
        total = teacher.calls()
        assert start(teacher, tmp_path, "again.json").wait() == 0
        assert teacher.calls() == total
    labelled = json.loads((tmp_path / "out.json").read_text())
    assert [one["targets"][0]["message"]["tool_calls"] for one in labelled] == [
        [{"name": "add", "arguments": {"a": index}}] for index in range(PROMPTS)
    ]
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_ctrl_c_keeps_what_was_stored(tmp_path):
    with LocalTeacher(answer, log=tmp_path / "calls.jsonl", delay_s=0.01) as teacher:
        process = start(teacher, tmp_path)
        while process.poll() is None and sum(teacher.calls().values()) < 10:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        assert process.wait() != 0
        kept, asked = stored(tmp_path), teacher.calls()
        assert 0 < len(kept) < PROMPTS
        assert start(teacher, tmp_path).wait() == 0
        assert {prompt: teacher.calls()[prompt] for prompt in kept} == {prompt: asked[prompt] for prompt in kept}
