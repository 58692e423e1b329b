"""Each format is read as its owner writes it, leniencies included."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from stillroom.data import DataWarning, ReadLimits, Rejection, check, read
from stillroom.errors import ConfigError, DataError
from stillroom.schema import Example, Message, ToolCall, to_dict
from tests.data.conftest import Write
from tests.data.records import asked, bedrock, bfcl, line, log, openai, said, tool

MIB = 2**20
WEATHER = {
    "toolSpec": {
        "name": "get_weather",
        "description": "Current weather for a city",
        "inputSchema": {"json": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}},
    }
}


def only(path: Path, *arguments: Any, **options: Any) -> Example:
    (found,) = [each for each in read(path, *arguments, **options) if not isinstance(each, DataWarning)]
    assert isinstance(found, Example), found
    return found


# bedrock-conversation-2024


def test_a_labelled_record_has_a_golden_answer_and_an_unlabelled_one_has_none(write: Write) -> None:
    path = write("a.jsonl", [bedrock("why?", "because", system=[{"text": "Be brief."}]), bedrock("how?")])

    labelled, unlabelled = read(path)

    assert isinstance(labelled, Example)
    assert isinstance(unlabelled, Example)
    assert labelled.messages == (Message("system", "Be brief."), Message("user", "why?"))
    assert [(t.origin, t.message.content) for t in labelled.targets] == [("golden", "because")]
    assert labelled.expected == "because"
    assert labelled.source == f"{path}:1"
    assert unlabelled.targets == ()
    assert unlabelled.expected is None


@pytest.mark.parametrize("more", [{"system": []}, {"system": None}, {"system": [{"text": "s", "type": "text"}]}])
def test_what_notebooks_write_is_accepted(write: Write, more: dict[str, Any]) -> None:
    example = only(write("a.jsonl", [bedrock(**more)]))

    assert example.messages[-1] == Message("user", "why is the sky blue")


def test_tools_may_stand_in_the_record_and_calls_in_blocks(write: Write) -> None:
    record = bedrock("Weather in Oslo?", toolConfig={"tools": [WEATHER]})
    call = {"toolUse": {"toolUseId": "1", "name": "get_weather", "input": {"city": "Oslo"}}}
    result = {"toolResult": {"toolUseId": "1", "content": [{"json": {"rain": True}}]}}
    record["messages"] += [
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": [{"text": "Rain."}]},
    ]

    example = only(write("a.jsonl", [record]))

    assert [each.name for each in example.tools] == ["get_weather"]
    assert example.messages[1].tool_calls == (ToolCall("get_weather", {"city": "Oslo"}),)
    assert example.messages[2] == Message("tool", '{"rain":true}')
    assert example.targets[0].message.content == "Rain."


def test_several_turns_are_taken_unless_the_student_cannot(write: Write) -> None:
    record = bedrock("one", "two")
    record["messages"] += bedrock("three")["messages"]
    path = write("a.jsonl", [record])

    assert only(path).messages[-1].content == "three"
    (rejected,) = read(path, limits=ReadLimits(multi_turn=False))
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "multi_turn_not_supported"


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_line_endings_and_byte_order_mark_do_not_matter(write: Write, ending: bytes, mark: bytes, last: bool) -> None:
    content = mark + ending.join([line(bedrock("a")).strip(), b"", line(bedrock("b")).strip()]) + ending * last

    assert [each.messages[0].content for each in read(write("a.jsonl", content))] == ["a", "b"]  # type: ignore[union-attr]


def test_a_line_of_100_mb_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(line(bedrock("before")))
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b"\n" + line(bedrock("after")))

    tracemalloc.start()
    before, rejected, after = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert isinstance(before, Example)
    assert isinstance(after, Example)
    assert isinstance(rejected, Rejection)
    assert (rejected.reason, rejected.line) == ("line_too_long", 2)
    assert "100000000 bytes" in rejected.message
    assert peak < 8 * MIB


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("wb") as file:
            for number in range(count):
                file.write(line(bedrock(f"question {number}")) if number % 3 else b"{bad\n")
        tracemalloc.start()
        check(path, out=tmp_path / "found")
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(50)  # imports and caches
    assert peak(4_000) < peak(500) + MIB // 4


# AWS's published example, after its description: it requires `city`, which it does not declare, and answers
# with a city that the prompt does not name. Its tools stand in the system text, there not as valid JSON.
AWS_TOOLS = """[{"name": "lookup_weather", "description": "Look up the weather", "parameters": {"type": "dict",
"required": ["city"], "properties": {"location": {"type": "string"}, "date": {"type": "string"}}}}]"""
AWS_ANSWER = '[lookup_weather(location="san francisco", date="tomorrow")]'
AWS_SPELLINGS = {
    "json": AWS_TOOLS,
    "single quotes": AWS_TOOLS.replace('"', "'"),
    "a missing quote": AWS_TOOLS.replace('"description"', '"description'),
    "trailing commas": AWS_TOOLS.replace("}}", ",},}"),
}


@pytest.mark.parametrize("spelling", AWS_SPELLINGS)
def test_both_faults_of_the_published_example_are_diagnosed_and_it_is_accepted(write: Write, spelling: str) -> None:
    system = f"You are an expert in composing functions. It's yours to choose. Functions: {AWS_SPELLINGS[spelling]}"
    path = write("a.jsonl", [bedrock("What is the weather tomorrow?", AWS_ANSWER, system=[{"text": system}])])

    insights = check(path)

    assert (insights.accepted, insights.warned, insights.rejected) == (1, 1, 0)
    faults = dict(insights.by_reason)
    assert faults.pop("tools_not_valid_json", 0) == (spelling != "json")  # type: ignore[call-overload]
    assert faults == {"undeclared_required_parameter": 1, "ungrounded_argument": 1}
    messages = {found.reason.value: found.message for kept in insights.samples.values() for found in kept}
    assert "'city'" in messages["undeclared_required_parameter"]
    assert "san francisco" in messages["ungrounded_argument"]


def test_the_published_example_pasted_as_it_stands_is_diagnosed_beyond_its_quotes(write: Write) -> None:
    pasted = json.dumps(
        bedrock("What is the weather tomorrow?", AWS_ANSWER, system=[{"text": "TOOLS"}]), indent=4
    ).replace('"TOOLS"', f"'Choose from: {AWS_SPELLINGS['a missing quote']}'")

    for name, text in (("a.jsonl", pasted), ("b.jsonl", pasted.replace("\n", " "))):
        reasons = [found.reason for found in read(write(name, text.encode())) if not isinstance(found, Example)]
        assert reasons[0] in ("not_json_lines", "invalid_json")
        assert {"undeclared_required_parameter", "ungrounded_argument"} <= set(reasons[1:])


def test_diagnosing_a_broken_record_survives_what_only_its_repair_would_hold(write: Write) -> None:
    tools = [{"toolSpec": {"name": "f\ud800", "inputSchema": {"json": {"maximum": 2**70, "minimum": 0.5}}}}]
    broken = line(bedrock(toolConfig={"tools": tools})).strip() + b",\n"

    assert [each.reason for each in read(write("a.jsonl", broken))] == ["invalid_json"]  # type: ignore[union-attr]


def test_an_answer_from_the_prompt_draws_no_warning(write: Write) -> None:
    tools = json.dumps([tool("lookup_weather", "location", "date")])
    record = bedrock("Weather in San Francisco, please, for tomorrow?", AWS_ANSWER, system=[{"text": tools}])

    assert check(write("a.jsonl", [record])).warned == 0


def test_an_answer_that_its_tools_do_not_allow_draws_a_warning(write: Write) -> None:
    record = bedrock("Weather in Oslo?", toolConfig={"tools": [WEATHER]})
    call = {"toolUse": {"name": "get_weather", "input": {"town": "Oslo"}}}
    record["messages"].append({"role": "assistant", "content": [call]})

    assert "answer_not_a_valid_call" in check(write("a.jsonl", [record])).by_reason


# OpenAI


def test_a_chat_with_tools_is_read_and_its_last_message_is_the_answer(write: Write) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    function = {"name": "get_weather", "parameters": WEATHER["toolSpec"]["inputSchema"]["json"]}  # type: ignore[index]
    record = openai(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        tools=[{"type": "function", "function": function}],
        metadata={"project": "Mine"},
    )

    example = only(write("a.jsonl", [record]))

    assert example.messages == (Message("system", "Be brief."), Message("user", "Weather in Oslo?"))
    assert example.targets[0].message.tool_calls == (ToolCall("get_weather", {"city": "Oslo"}),)
    assert example.expected == [{"get_weather": {"city": ["Oslo"]}}]
    assert example.metadata == {"project": "Mine"}


# BFCL


def test_questions_are_joined_with_their_answers_by_id_in_any_order(write: Write) -> None:
    questions = [bfcl(f"q{number}", f"word{number} and more") for number in range(5)]
    answers = [{"id": q["id"], "ground_truth": [{q["function"][0]["name"]: {"query": [q["id"]]}}]} for q in questions]
    path = write("BFCL_v4_live_simple.json", questions)
    write("possible_answer/BFCL_v4_live_simple.json", answers[::-1])

    examples = [each for each in read(path, "bfcl") if isinstance(each, Example)]

    assert [each.id for each in examples] == ["q0", "q1", "q2", "q3", "q4"]
    assert [each.targets[0].message.tool_calls[0].arguments["query"] for each in examples] == [
        each.id for each in examples
    ]
    assert {each.category for each in examples} == {"live_simple"}


def test_a_question_that_no_tool_answers_expects_no_call(write: Write) -> None:
    example = only(write("BFCL_v4_irrelevance.json", [bfcl("i", "hello")]))

    assert example.expected == []
    assert example.targets == ()


# Invocation logs


def test_a_log_as_delivered_is_read_with_its_stored_bodies(write: Write, tmp_path: Path) -> None:
    hour = "AWSLogs/123456789012/BedrockModelInvocationLogs/us-east-1/2026/05/04/12"
    stored = log(requestId="big", requestMetadata={"project": "Mine"})
    for side, body in (("input", asked("A long question")), ("output", said("A long answer"))):
        write(f"{hour}/data/big_{side}.json.gz", gzip.compress(json.dumps(body).encode()))
        stored[side] = {f"{side}BodyS3Path": f"s3://bucket/prefix/{hour}/data/big_{side}.json.gz"}
    write(
        f"{hour}/20260504T120000000Z_0123456789abcdef.json.gz",
        gzip.compress(line(log(requestId="small")) + line(stored)),
    )
    write("AWSLogs/123456789012/BedrockModelInvocationLogs/amazon-bedrock-logs-permission-check", b"")

    found = list(read(tmp_path))

    assert [type(each) for each in found] == [Example, Example]
    small, big = found
    assert isinstance(small, Example)
    assert isinstance(big, Example)
    assert (small.id, big.id) == ("small", "big")
    assert big.messages == (Message("user", "A long question"),)
    assert big.targets[0].message.content == "A long answer"
    assert (big.targets[0].origin, big.targets[0].model) == ("teacher", "qwen.qwen2-5-7b-instruct-v1:0")
    assert big.expected is None
    assert big.metadata == {"project": "Mine"}


def test_a_stored_body_is_found_by_the_tail_of_its_key(write: Write, tmp_path: Path) -> None:
    record = log() | {"input": {"inputBodyS3Path": "s3://bucket/logs/elsewhere/q_input.json"}}
    write("elsewhere/q_input.json", json.dumps(asked("Found")).encode())
    path = write("records/a.json.gz", gzip.compress(line(record)))

    found = [each for each in read(tmp_path) if isinstance(each, Example)]

    assert [each.messages[0].content for each in found] == ["Found"]
    assert [each for each in read(path) if isinstance(each, Example)] == []  # not below the folder that is read


def test_a_stored_body_that_links_outside_is_not_followed(write: Write, tmp_path: Path) -> None:
    write("secret.json", json.dumps(asked("Secret")).encode())
    record = log() | {"input": {"inputBodyS3Path": "s3://b/p/data/x_input.json"}}
    path = write("log/a.json.gz", gzip.compress(line(record)))
    (tmp_path / "log" / "data").mkdir()
    (tmp_path / "log" / "data" / "x_input.json").symlink_to(tmp_path / "secret.json")

    (rejected,) = read(path)

    assert isinstance(rejected, Rejection)
    assert rejected.reason == "body_outside_log"


NOVA_STREAM = [
    {"messageStart": {"role": "assistant"}},
    {"contentBlockDelta": {"delta": {"text": "Ra"}, "contentBlockIndex": 0}},
    {"contentBlockDelta": {"delta": {"text": "in."}, "contentBlockIndex": 0}},
    {"contentBlockStop": {"contentBlockIndex": 0}},
    {"messageStop": {"stopReason": "end_turn"}},
]
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
ANTHROPIC = {
    "anthropic_version": "bedrock-2023-05-31",
    "system": "Be brief.",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}],
}
ANTHROPIC_STREAM = [
    {"type": "message_start", "message": {"content": []}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Ra"}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "in."}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
]
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q?"}]}
NATIVE = {
    "llama 3": ({"prompt": LLAMA3, "max_gen_len": 9}, {"generation": "\n\nRain.", "stop_reason": "stop"}),
    "llama 3 stream": ({"prompt": LLAMA3}, [{"generation": "Ra"}, {"generation": "in.", "stop_reason": "stop"}]),
    "llama 2": ({"prompt": "<s>[INST] <<SYS>>Be brief.<</SYS>> Q? [/INST]"}, {"generation": "Rain."}),
    "mistral": ({"prompt": "<s>[INST] <<SYS>>Be brief.<</SYS>> Q? [/INST]"}, {"outputs": [{"text": "Rain."}]}),
    "anthropic": (ANTHROPIC, {"content": [{"type": "text", "text": "Rain."}], "stop_reason": "end_turn"}),
    "anthropic stream": (ANTHROPIC, ANTHROPIC_STREAM),
    "claude 2": ({"prompt": "Be brief.\n\nHuman: Q?\n\nAssistant:"}, {"completion": " Rain."}),
    "nova": (asked("Q?", system=[{"text": "Be brief."}]), said("Rain.")),
    "nova stream": (asked("Q?", system=[{"text": "Be brief."}]), NOVA_STREAM),
    "titan": ({"inputText": "System: Be brief.\nUser: Q?\nBot:"}, {"results": [{"outputText": "Rain."}]}),
    "cohere": ({"message": "Q?", "preamble": "Be brief."}, {"text": "Rain.", "finish_reason": "COMPLETE"}),
    "openai": (CHAT, {"choices": [{"message": {"role": "assistant", "content": "Rain."}, "finish_reason": "stop"}]}),
    "openai stream": (
        CHAT,
        [{"choices": [{"delta": {"content": "Ra"}}]}, {"choices": [{"delta": {"content": "in."}}]}],
    ),
}


@pytest.mark.parametrize("form", NATIVE)
def test_every_native_body_says_the_same(write: Write, form: str) -> None:
    request, response = NATIVE[form]
    operation = "InvokeModelWithResponseStream" if isinstance(response, list) else "InvokeModel"

    example = only(write("a.jsonl", [log(request, response, operation)]))

    assert example.messages == (Message("system", "Be brief."), Message("user", "Q?"))
    assert example.targets[0].message == Message("assistant", "Rain.")


@pytest.mark.parametrize("response", [said("Rain."), NOVA_STREAM, [said("Rain.")]])
def test_a_streamed_converse_answer_is_read_as_object_and_as_events(write: Write, response: Any) -> None:
    example = only(write("a.jsonl", [log(response=response, operation="ConverseStream")]))

    assert example.targets[0].message.content == "Rain."


def test_tool_calls_are_read_from_converse_and_anthropic_alike(write: Write) -> None:
    schema = WEATHER["toolSpec"]["inputSchema"]["json"]  # type: ignore[index]
    native = {**ANTHROPIC, "tools": [{"name": "get_weather", "description": "W", "input_schema": schema}]}
    use = {"name": "get_weather", "input": {"city": "Oslo"}}
    streamed = [
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "tool_use", "name": "get_weather", "input": {}},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": '{"city":'}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": ' "Oslo"}'}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}},
    ]
    records = [
        log(
            asked("Q?", toolConfig={"tools": [WEATHER]}),
            {"output": {"message": {"role": "assistant", "content": [{"toolUse": use}]}}, "stopReason": "tool_use"},
        ),
        log(native, {"content": [{"type": "tool_use", **use}], "stop_reason": "tool_use"}, "InvokeModel"),
        log(native, streamed, "InvokeModelWithResponseStream"),
    ]

    found = [each for each in read(write("a.jsonl", records)) if isinstance(each, Example)]

    assert len(found) == 3
    for example in found:
        assert [each.name for each in example.tools] == ["get_weather"]
        assert example.targets[0].message.tool_calls == (ToolCall("get_weather", {"city": "Oslo"}),)


@pytest.mark.parametrize(
    "name",
    [
        "amazon.nova-pro-v1:0",
        "us.amazon.nova-pro-v1:0",
        "arn:aws:bedrock:us-east-1::foundation-model/amazon.nova-pro-v1:0",
        "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.amazon.nova-pro-v1:0",
    ],
)
def test_a_model_is_the_teacher_by_whatever_name_it_was_called(write: Write, name: str) -> None:
    assert only(write("a.jsonl", [log(model=name)]), model="amazon.nova-pro-v1:0").targets[0].model == name


# Any format


def test_a_folder_may_mix_formats(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", [bedrock("a")])
    write("b.jsonl", [openai({"role": "user", "content": "b"})])
    write("c.json.gz", gzip.compress(line(log(asked("c")))))
    write("d.json", [bfcl("d", "d")])
    write(".hidden.jsonl", [bedrock("hidden")])

    assert [each.messages[0].content for each in read(tmp_path)] == ["a", "b", "c", "d"]  # type: ignore[union-attr]


def test_a_callers_mistakes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="answers file"):
        read(tmp_path, "bfcl", answers=tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="unknown format"):
        read(tmp_path, "csv")


def test_a_file_name_that_is_not_utf_8_can_be_reported(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xffd.jsonl"))
    path.write_bytes(line(bedrock()) + b"{bad\n")

    insights = check(path, out=tmp_path / "out")

    assert (insights.accepted, insights.rejected) == (1, 1)
    assert "invalid_json" in insights.to_text().encode().decode()


def test_examples_are_plain_json_values(write: Write) -> None:
    example = only(write("a.jsonl", [bedrock("Weather in Oslo?", "Rain", toolConfig={"tools": [WEATHER]})]))

    assert json.loads(json.dumps(to_dict(example)))["messages"][0]["content"] == "Weather in Oslo?"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[get_weather(city="Rome")]', (ToolCall("get_weather", {"city": "Rome"}),)),
        ('{"name": "get_weather", "arguments": {"city": "Rome"}}', (ToolCall("get_weather", {"city": "Rome"}),)),
        ("It is sunny in Rome.", ()),
        ("[]", ()),
        ("[1, 2, 3]", ()),
    ],
)
def test_a_golden_text_that_is_calls_is_scored_as_calls(write: Write, text: str, calls: tuple[ToolCall, ...]) -> None:
    found = only(write("a.jsonl", [bedrock("what is it like", text, toolConfig={"tools": [WEATHER]})]))

    assert found.targets[0].message == Message("assistant", "" if calls else text, calls)
    assert found.expected == ([{"get_weather": {"city": ["Rome"]}}] if calls else text)


def test_a_text_that_looks_like_a_call_stays_a_text_where_no_tools_are_offered(write: Write) -> None:
    found = only(write("a.jsonl", [bedrock("what is it like", '[get_weather(city="Rome")]')]))

    assert found.expected == '[get_weather(city="Rome")]'
