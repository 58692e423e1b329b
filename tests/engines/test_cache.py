"""Answers that were paid for are never lost, and never taken from a damaged line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillroom.engines import AnswerCache, answer_key
from stillroom.schema import Completion, GenerateParams, Message, ToolCall, ToolSpec


def completion(text: str = "hello", **fields: object) -> Completion:
    defaults = {"input_tokens": 3, "output_tokens": 4, "cost_usd": 0.5}
    return Completion(Message("assistant", text), "m", **(defaults | fields))  # type: ignore[arg-type]


def test_an_answer_comes_back_as_it_was_stored(tmp_path):
    answers = {
        "a" * 64: completion("ünï — 漢字 \U0001f600 \u2028 \ud800 \x00"),
        "b" * 64: Completion(
            Message("assistant", "", (ToolCall("f", {"x": [1, 2.5, None, True, {"y": "z"}]}),)),
            "m",
            "tool_calls",
            latency_s=0.25,
        ),
    }
    with AnswerCache(tmp_path) as cache:
        for key, answer in answers.items():
            cache.put(key, answer)
        assert {key: cache.get(key) for key in answers} == answers
    with AnswerCache(tmp_path) as again:
        assert {key: again.get(key) for key in answers} == answers
        assert again.get("c" * 64) is None
        assert len(again) == 2


def test_a_second_answer_under_a_key_changes_only_the_spending(tmp_path):
    with AnswerCache(tmp_path) as cache:
        cache.put("k", completion("first"), account="a")
        cache.put("k", completion("second"), account="a")
        assert cache.get("k") == completion("first")
        assert cache.spent("a") == (14, 1.0)
    with AnswerCache(tmp_path) as cache:
        assert cache.get("k") == completion("first")


@pytest.mark.parametrize("cut", [2, 40, 120])
def test_a_torn_last_line_is_absent_and_the_next_answer_is_whole(tmp_path, cut):
    with AnswerCache(tmp_path) as cache:
        cache.put("one", completion("1"))
        cache.put("two", completion("2"))
        path = cache.path
    os.truncate(path, path.stat().st_size - cut)
    with AnswerCache(tmp_path) as cache:
        assert cache.get("one") == completion("1")
        assert cache.get("two") is None
        cache.put("two", completion("2 again"))
        cache.put("three", completion("3"))
    with AnswerCache(tmp_path) as cache:
        assert [cache.get(key) for key in ("one", "two", "three")] == [
            completion(text) for text in ("1", "2 again", "3")
        ]


def test_a_changed_line_counts_as_absent(tmp_path):
    with AnswerCache(tmp_path) as cache:
        cache.put("one", completion("right"))
        cache.put("two", completion("right"))
        path = cache.path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0].replace("right", "wrong") + lines[1])
    with AnswerCache(tmp_path) as cache:
        assert cache.get("one") is None
        assert cache.get("two") == completion("right")
        assert cache.damaged == 1


@settings(max_examples=int(os.environ.get("STILLROOM_FUZZ_EXAMPLES", "60")), deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(junk=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["key", "sum", "account", "completion", "tokens", "usd", "x"]), inner, max_size=5),
    max_leaves=8).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_no_content_of_the_file_breaks_the_cache(tmp_path, junk):
    path = tmp_path / "answers.jsonl"
    path.unlink(missing_ok=True)
    with AnswerCache(tmp_path) as cache:
        cache.put("before", completion())
        with path.open("ab") as file:
            file.write(junk)
        cache.put("after", completion())
    with AnswerCache(tmp_path) as cache:
        assert cache.get("before") == cache.get("after") == completion()


def test_what_another_process_stored_is_seen_without_opening_again(tmp_path):
    mine, other = AnswerCache(tmp_path), AnswerCache(tmp_path)
    assert mine.get("k") is None
    other.put("k", completion(), account="a")
    assert mine.get("k") == completion()
    assert mine.spent("a") == (7, 0.5)
    mine.close()
    other.close()


WRITER = """
import sys
from stillroom.engines import AnswerCache
from stillroom.schema import Completion, Message
with AnswerCache(sys.argv[1]) as cache:
    for index in range(100):
        cache.put(f"{sys.argv[2]}-{index}", Completion(Message("assistant", sys.argv[2] * 2000), "m"), account="a")
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "xyz"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with AnswerCache(tmp_path) as cache:
        assert len(cache) == 300
        assert cache.damaged == 0
        assert all(cache.get(f"{name}-{index}") is not None for name in "xyz" for index in range(100))


def test_a_line_longer_than_one_read_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("stillroom.engines.cache.READ_BYTES", 64)
    with AnswerCache(tmp_path) as cache:
        cache.put("long", completion("x" * 5000))
        cache.put("short", completion())
    with AnswerCache(tmp_path) as cache:
        assert cache.get("long") == completion("x" * 5000)
        assert cache.get("short") == completion()


def test_everything_that_decides_an_answer_is_in_its_key():
    messages, tools = (Message("user", "hi"),), (ToolSpec("f"),)
    base = answer_key("model", messages, tools, GenerateParams())
    others = [
        answer_key("other", messages, tools, GenerateParams()),
        answer_key("model", (Message("user", "ho"),), tools, GenerateParams()),
        answer_key("model", messages, (ToolSpec("g"),), GenerateParams()),
        *(
            answer_key("model", messages, tools, GenerateParams(**change))
            for change in (
                {"max_tokens": 1},
                {"temperature": 1.0},
                {"seed": 1},
                {"stop": ("x",)},
                {"constrain": True},
            )
        ),
    ]
    assert len({base, *others}) == len(others) + 1
    assert answer_key("model", messages, tools, GenerateParams()) == base
