"""Splits hold what they promise; checked against computations of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.config import build_config
from stillroom.data import DataConfig, Prepared, prepare
from stillroom.data.near_duplicates import alike
from stillroom.errors import ConfigError, NotEnoughData
from stillroom.schema import Example, Message
from tests.data.conftest import Write
from tests.data.records import bedrock, bfcl, log, openai

TEXT = "order refund parcel invoice meeting ticket flight hotel password network router printer"
WORDS = TEXT.split()


def config(*sources: dict[str, Any] | Path, **more: Any) -> DataConfig:
    listed = [source if isinstance(source, dict) else {"path": str(source), "format": "bfcl"} for source in sources]
    return build_config(DataConfig, {"sources": listed, "minimum": 1, **more}, "recipe")


def questions(count: int, *, prefix: str = "q", shared: int = 5) -> list[dict[str, Any]]:
    """Questions of which `shared` in a row have a tool in common."""
    return [
        bfcl(
            f"{prefix}{n}",
            f"{WORDS[n % 12]} number {n * 7919} of {WORDS[n * 5 % 12]} {n}",
            f"{prefix}_tool_{n // shared}",
        )
        for n in range(count)
    ]


def ids(examples: tuple[Example, ...]) -> list[str]:
    return [example.id for example in examples]


def all_ids(prepared: Prepared) -> dict[str, str]:
    return {each.id: each.split or "" for each in (*prepared.train, *prepared.validation, *prepared.test)}


def test_splits_have_the_sizes_asked_for_and_share_no_record(write_bfcl: Write) -> None:
    prepared = prepare(config(write_bfcl("q.json", questions(200)), train=80, validation=20, test=30), seed=0)

    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (80, 20, 30)
    assert len(all_ids(prepared)) == 130
    assert prepared.report["splits"]["test"]["total"] == 30
    assert prepared.report["accepted"] == 200


def test_no_tool_of_a_held_out_record_is_in_training(write_bfcl: Write) -> None:
    many = questions(300, shared=7)
    for n in range(0, 300, 11):  # chains: some questions have a second tool, of another group
        many[n]["function"] += many[(n + 40) % 300]["function"]
    path = write_bfcl("q.json", many)

    for seed in range(5):
        prepared = prepare(config(path, validation=20, test=40, group_by="tools"), seed=seed)

        tools = {
            name: {tool.name for example in examples for tool in example.tools}
            for name, examples in (("train", prepared.train), ("val", prepared.validation), ("test", prepared.test))
        }
        assert not tools["train"] & (tools["test"] | tools["val"])
        assert not tools["val"] & tools["test"]
        assert prepared.report["held_out_tools"]["in_training"] == 0
        assert len(prepared.test) == 40


def test_a_giant_group_is_cut_only_where_nothing_else_fills_a_split(write_bfcl: Write) -> None:
    giant = [bfcl(f"g{n}", f"giant {n} {n * 7919}", "everywhere") for n in range(100)]
    small = questions(20, shared=1)

    options: dict[str, Any] = {"test": 20, "near_duplicates": None, "group_by": "tools"}

    whole = prepare(config(write_bfcl("a.json", giant + small), **options), seed=1)
    cut = prepare(config(write_bfcl("b.json", giant), **options), seed=1)

    assert sorted(ids(whole.test)) == sorted(q["id"] for q in small)
    assert len(whole.train) == 100
    assert (len(cut.test), len(cut.train)) == (20, 0)
    assert cut.report["left_out"]["shared_tools_with_held_out"] == 80
    with pytest.raises(NotEnoughData, match="train"):
        prepare(config(write_bfcl("c.json", giant), train=1, **options), seed=1)


def test_categories_are_balanced_exactly_in_held_out_splits(write_bfcl: Write) -> None:
    simple, multiple = (
        write_bfcl(f"{name}.json", questions(count, prefix=name)) for name, count in (("s", 150), ("m", 60))
    )
    sources = [{"path": str(path), "format": "bfcl", "category": path.stem} for path in (simple, multiple)]
    settings = {"train": 100, "validation": 10, "test": 40, "balance": True, "group_by": "tools"}

    prepared = prepare(config(*sources, **settings), seed=3)

    assert prepared.report["splits"]["test"] == {"total": 40, "m": 20, "s": 20}
    assert prepared.report["splits"]["validation"] == {"total": 10, "m": 5, "s": 5}
    assert prepared.report["splits"]["train"]["total"] == 100  # the smaller category gave what it had
    with pytest.raises(NotEnoughData, match=r"missing: \d+ m"):
        prepare(config(*sources, **{**settings, "test": 130}), seed=3)


def test_the_order_of_files_and_records_changes_nothing(write_bfcl: Write) -> None:
    first, second = questions(60, prefix="a"), questions(60, prefix="b")
    one = prepare(config(write_bfcl("1.json", first), write_bfcl("2.json", second), test=20, train=50), seed=5)
    other = prepare(
        config(write_bfcl("3.json", second[::-1]), write_bfcl("4.json", first[::-1]), test=20, train=50), seed=5
    )

    assert [ids(one.train), ids(one.test)] == [ids(other.train), ids(other.test)]


def test_another_seed_gives_another_split(write_bfcl: Write) -> None:
    path = write_bfcl("q.json", questions(100))

    assert ids(prepare(config(path, test=20), seed=1).test) != ids(prepare(config(path, test=20), seed=2).test)


@pytest.mark.parametrize("group_by", ["none", "tools"])
def test_adding_a_record_moves_few_others(write_bfcl: Write, group_by: str) -> None:
    many = questions(201, shared=3)
    settings = {"test": 40, "validation": 20, "group_by": group_by}
    before = all_ids(prepare(config(write_bfcl("a.json", many[:200]), **settings), seed=7))
    after = all_ids(prepare(config(write_bfcl("b.json", many), **settings), seed=7))

    moved = [name for name, split in before.items() if after.get(name) != split]
    assert len(moved) <= 12


# Near-duplicates


def reference_similarity(one: str, other: str) -> float:
    """Jaccard index of character 5-grams, written down anew."""

    def grams(text: str) -> set[str]:
        text = " ".join(re.findall(r"\w+", text.lower()))
        return {text[i : i + 5] for i in range(len(text) - 4)} if len(text) >= 5 else {text}

    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def example(text: str) -> Example:
    return Example(text, (Message("system", "the same for all"), Message("user", text)))


TEXTS = st.lists(st.sampled_from(WORDS), min_size=0, max_size=12).map(" ".join)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=8), st.lists(TEXTS, max_size=8), st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_the_search_finds_what_comparing_all_pairs_finds(
    candidates: list[str], held: list[str], threshold: float
) -> None:
    pool, held_out = [example(text) for text in candidates], [example(text) for text in held]
    found = {id(each): score for each, _, score in alike(pool, held_out, threshold)}

    for each in pool:
        best = max((reference_similarity(each.id, other) for other in held), default=0.0)
        if best >= threshold:
            assert found[id(each)] == pytest.approx(best)
        else:
            assert id(each) not in found


def test_a_planted_near_duplicate_of_a_held_out_prompt_is_removed(write_bfcl: Write, write: Write) -> None:
    path = write_bfcl("q.json", questions(100))
    held_out = prepare(config(path, test=20), seed=0).test
    planted = [f"{each.messages[0].content.upper()}!?" for each in held_out[:4]]
    source = {"path": str(write("p.jsonl", [bedrock(text) for text in planted])), "role": "train"}

    prepared = prepare(config(path, source, test=20), seed=0)

    assert ids(prepared.test) == ids(held_out)
    texts = [each.messages[-1].content for each in prepared.train]
    assert not set(texts) & set(planted)
    assert prepared.report["near_duplicates"]["removed"] >= 4
    assert prepared.report["near_duplicates"]["samples"][0]["similarity"] >= 0.8
    worst = max(reference_similarity(a, b.messages[-1].content) for a in texts for b in prepared.test)
    assert worst < 0.8
    kept = prepare(config(path, source, test=20, near_duplicates=None), seed=0)
    assert set(planted) <= {each.messages[-1].content for each in kept.train}


# Repeats, roles, golden answers


def test_a_repeat_is_dropped_and_its_answers_are_joined(write_bfcl: Write, write: Write) -> None:
    question = bfcl("q", "parcel for Oslo", "track")
    asked = {
        "messages": [{"role": "user", "content": [{"text": "parcel for Oslo"}]}],
        "toolConfig": {
            "tools": [
                {
                    "toolSpec": {
                        "name": "track",
                        "inputSchema": {
                            "json": {
                                "type": "object",
                                "properties": {"query": {"type": "string"}},
                                "required": ["query"],
                            }
                        },
                    }
                }
            ]
        },
    }
    use = {"toolUse": {"name": "track", "input": {"query": "Oslo"}}}
    answered = {"output": {"message": {"role": "assistant", "content": [use]}}, "stopReason": "tool_use"}
    logs = {"path": str(write("log.jsonl", [log(asked, answered)])), "format": "invocation_logs"}

    prepared = prepare(config(write_bfcl("q.json", [question]), logs), seed=0)

    assert prepared.report["repeats_dropped"] == 1
    (joined,) = prepared.train
    assert {target.origin for target in joined.targets} == {"golden", "teacher"}
    assert joined.expected == [{"track": {"query": ["parcel"]}}]


def test_a_source_keeps_to_its_side(write: Write) -> None:
    def source(role: str, *texts: str) -> dict[str, Any]:
        return {"path": str(write(f"{role}.jsonl", [bedrock(text) for text in texts])), "role": role}

    shared = "a prompt that both of them hold"
    train = source("train", shared, *(f"train {n * 7919} only" for n in range(30)))
    held = source("evaluate", shared, *(f"held {n * 104729} out" for n in range(30)))

    prepared = prepare(config(train, held, test=20, near_duplicates=None), seed=0)

    assert len(prepared.train) == 30
    assert all(each.messages[0].content.startswith("train") for each in prepared.train)
    assert not any(each.messages[0].content.startswith("train") for each in prepared.test)


def test_golden_answers_are_shown_to_the_share_asked_for(write_bfcl: Write) -> None:
    path = write_bfcl("q.json", questions(100))

    prepared = prepare(config(path, test=20, golden={"fraction": 0.25, "upsample": 3}), seed=0)

    golden = [each for each in prepared.train if each.targets]
    assert len(golden) == 20
    assert all(each.metadata["repeats"] == 3 for each in golden)
    assert all(each.expected for each in prepared.train)
    assert prepared.report["golden"] == {"records": 20, "repeats": 60}
    again = prepare(config(path, test=20, golden={"fraction": 0.5}), seed=0)
    assert set(ids(tuple(golden))) <= {each.id for each in again.train if each.targets}


def test_answers_of_a_source_may_be_kept_from_training(write: Write) -> None:
    source = {"path": str(write("a.jsonl", [bedrock("q", "a")])), "use_answers": False}

    (example,) = prepare(config(source), seed=0).train

    assert example.targets == ()
    assert example.expected == "a"


# Limits


def test_prompts_with_too_many_tokens_are_rejected_with_their_count(write: Write) -> None:
    path = write("a.jsonl", [openai({"role": "user", "content": "word " * n}) for n in range(1, 11)])

    prepared = prepare(
        config({"path": str(path)}, max_prompt_tokens=4), 0, lambda messages, tools: len(messages[-1].content.split())
    )

    assert len(prepared.train) == 4
    assert prepared.report["rejected"] == {"too_many_tokens": 6}
    assert "has 5 tokens" in prepared.report["rejections"][0]["message"]
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        prepare(config({"path": str(path)}, max_prompt_tokens=4), 0)


def test_too_few_records_stop_before_anything_starts(write: Write) -> None:
    path = write("a.jsonl", b"{bad\n" + b'{"schemaVersion": "bedrock-conversation-2024", "messages": []}\n')

    with pytest.raises(NotEnoughData, match=r"0 records.*minimum is 100.*invalid_json 1"):
        prepare(config({"path": str(path)}, minimum=100), 0)


def test_a_prompt_that_came_before_is_named_among_what_was_rejected(write: Write) -> None:
    record = b'{"messages": [{"role": "user", "content": "Again?"}]}\n'
    path = write("a.jsonl", record + record)

    with pytest.raises(NotEnoughData, match=r"1 records.*minimum is 2.*duplicate_prompt 1"):
        prepare(config({"path": str(path)}, minimum=2), 0)


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such_package"):
        prepare(config({"path": "package:no_such_package/data.json"}), 0)
