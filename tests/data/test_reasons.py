"""Every kind of bad record is rejected for the right reason, and costs itself only."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from stillroom.data import DataWarning, ReadLimits, Reason, Rejection, check, read
from stillroom.schema import Example
from tests.data.conftest import Write
from tests.data.records import asked, bedrock, bfcl, line, log, openai, said

GOOD = line(bedrock("a good record"))
DEEP_TOOL = {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": 1}}}]}


def message(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def turns(*messages: Any, **more: Any) -> bytes:
    return line({"schemaVersion": "bedrock-conversation-2024", "messages": list(messages), **more})


TEXT = {"text": "hello"}
LINES: list[tuple[str, bytes]] = [
    # The line as text.
    ("invalid_utf8", GOOD.replace(b"good", b"g\xff\xfed")),
    ("invalid_utf8", GOOD.replace(b"good", "gööd".encode("latin1"))),
    ("invalid_json", GOOD[: len(GOOD) // 2] + b"\n"),
    ("invalid_json", GOOD.replace(b'"', b"'")),
    ("invalid_json", GOOD.rstrip() + b",\n"),
    ("invalid_json", GOOD.rstrip() + GOOD),
    ("invalid_json", b"\x00\x00\x00\n"),
    ("duplicate_keys", GOOD.replace(b'"role": "user"', b'"role": "assistant", "role": "user"')),
    ("duplicate_keys", GOOD.replace(b'"messages"', b'"system" : [], "system" :[], "messages"')),
    ("duplicate_keys", b'{"a\\\\": 1, "a\\\\": 2, "schemaVersion": "\\u0022"}\n'),
    ("duplicate_keys", b'{"role": 1, "r\\u006fle": 2}\n'),
    ("too_deep", b"[" * 5_000 + b"]" * 5_000 + b"\n"),
    ("too_deep", b'{"a":' * 70 + b"1" + b"}" * 70 + b"\n"),
    ("too_deep", b'{"a":' * 100_000 + b"\n"),
    ("not_a_number", GOOD.replace(b'"messages"', b'"score": NaN, "messages"')),
    ("not_a_number", GOOD.replace(b'"messages"', b'"score": -Infinity, "messages"')),
    ("not_a_number", GOOD.replace(b'"messages"', b'"score": 1e999, "messages"')),
    ("lone_surrogate", GOOD.replace(b"good", b"\\ud83d")),
    ("lone_surrogate", GOOD.replace(b"good", b"\\udc00 text")),
    ("not_an_object", b"[1, 2, 3]\n"),
    ("not_an_object", b'"text"\n'),
    ("not_an_object", b"null\n"),
    ("line_too_long", line(bedrock("x" * 200_000))),
    # bedrock-conversation-2024.
    ("wrong_schema_version", GOOD.replace(b"conversation", b"conversion")),
    ("wrong_schema_version", GOOD.replace(b"2024", b"2025")),
    ("wrong_schema_version", line({"messages": [message("user", TEXT)]})),
    ("wrong_schema_version", GOOD.replace(b'"bedrock-conversation-2024"', b"null")),
    ("missing_field", line({"schemaVersion": "bedrock-conversation-2024"})),
    ("missing_field", turns({"content": [TEXT]})),
    ("missing_field", turns({"role": "user"})),
    ("missing_field", turns(message("user", {"type": "text"}))),
    ("unknown_field", line(bedrock(extra=1))),
    ("unknown_field", turns({**message("user", TEXT), "name": "alice"})),
    ("unknown_field", turns(message("user", {**TEXT, "cache": True}))),
    ("unknown_field", turns(message("user", {"cachePoint": {"type": "default"}}))),
    ("wrong_type", line({"schemaVersion": "bedrock-conversation-2024", "messages": {}})),
    ("wrong_type", turns("hello")),
    ("wrong_type", turns({"role": "user", "content": "hello"})),
    ("wrong_type", turns(message("user", "hello"))),
    ("wrong_type", turns(message("user", {"text": 5}))),
    ("wrong_type", turns({"role": None, "content": [TEXT]})),
    ("wrong_type", line(bedrock(system="be brief"))),
    ("no_messages", turns()),
    ("bad_role", turns(message("human", TEXT))),
    ("bad_role", turns(message("system", TEXT), message("user", TEXT))),
    ("roles_not_alternating", turns(message("assistant", TEXT))),
    ("roles_not_alternating", turns(message("user", TEXT), message("user", TEXT))),
    ("several_system_blocks", line(bedrock(system=[TEXT, TEXT]))),
    ("not_one_content_block", turns(message("user", TEXT, TEXT))),
    ("not_one_content_block", turns(message("user"))),
    ("non_text_content", turns(message("user", {"image": {"format": "png", "source": {"bytes": ""}}}))),
    ("non_text_content", turns(message("user", TEXT, {"document": {"name": "x"}}))),
    ("blank_text", line(bedrock(""))),
    ("blank_text", line(bedrock(" \t\n "))),
    ("blank_text", line(bedrock("hello", " "))),
    ("blank_text", line(bedrock(system=[{"text": ""}]))),
    ("bad_tools", line(bedrock(toolConfig=DEEP_TOOL))),
    ("bad_tools", line(bedrock(toolConfig={"tools": "weather"}))),
    ("bad_tool_call", turns(message("user", TEXT), message("assistant", {"toolUse": {"name": "f", "input": "x"}}))),
    ("bad_tool_call", turns(message("user", {"toolUse": {"name": "f", "input": {}}}))),
    ("duplicate_prompt", GOOD),
]
OPENAI = [
    ("no_messages", openai() | {"messages": []}),
    ("missing_field", openai({"role": "user"})),
    ("missing_field", {"messages": [{"content": "hi"}]}),
    ("wrong_type", {"messages": "hi"}),
    ("wrong_type", openai({"role": "user", "content": 7})),
    ("bad_role", openai({"role": "human", "content": "hi"})),
    ("blank_text", openai({"role": "user", "content": "  "})),
    ("non_text_content", openai({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})),
    ("no_prompt", openai({"role": "system", "content": "hi"})),
    ("roles_not_alternating", openai({"role": "user", "content": "a"}, {"role": "tool", "content": "b"})),
    ("roles_not_alternating", openai({"role": "assistant", "content": "a"}, {"role": "user", "content": "b"})),
    ("unknown_field", openai(mesages=[])),
    ("bad_tools", openai(tools=[{"type": "function"}])),
    ("bad_tools", openai(tools=[{"type": "function", "function": {"name": "f", "parameters": 3}}])),
    (
        "bad_tool_call",
        openai(
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{"}}]},
        ),
    ),
    (
        "bad_tool_call",
        openai(
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "[]"}}]},
        ),
    ),
    ("call_failed", openai({"role": "user", "content": "a"}, {"role": "assistant", "refusal": "No."})),
]
LOGS = [
    ("not_a_log_record", log() | {"schemaType": "Other"}),
    ("not_a_log_record", {key: value for key, value in log().items() if key != "input"}),
    ("not_a_log_record", {key: value for key, value in log().items() if key != "modelId"}),
    ("unknown_operation", log(operation="Rerank")),
    ("call_failed", log(errorCode="ThrottlingException")),
    ("call_failed", log(response=said(stop="guardrail_intervened"))),
    ("response_truncated", log(response=said(stop="max_tokens"))),
    ("not_the_teacher", log(model="amazon.nova-pro-v1:0")),
    ("filtered_out", log(requestMetadata={"project": "Other"})),
    ("missing_body", log() | {"output": {}}),
    ("missing_body", log() | {"input": {"inputContentType": "application/json"}}),
    ("body_not_found", log() | {"input": {"inputBodyS3Path": "s3://b/p/data/x_input.json.gz"}}),
    ("body_outside_log", log() | {"input": {"inputBodyS3Path": "s3://b/../../etc/passwd"}}),
    ("body_outside_log", log() | {"input": {"inputBodyS3Path": "/etc/passwd"}}),
    ("unknown_body_format", log({"vector": [1]}, {"embedding": [1]}, "InvokeModel")),
    ("unknown_body_format", log({"prompt": "hi"}, {"embedding": [1]}, "InvokeModel")),
    ("unknown_body_format", log({"prompt": "hi"}, [{"bytes": "x"}], "InvokeModelWithResponseStream")),
    ("non_text_content", log({"messages": [message("user", {"video": {}})]})),
    ("blank_text", log({"prompt": "hi"}, {"generation": " "}, "InvokeModel")),
    ("response_truncated", log({"prompt": "hi"}, {"generation": "x", "stop_reason": "length"}, "InvokeModel")),
    ("multi_turn_not_supported", log({"messages": [message("user", TEXT), message("assistant", TEXT)] * 2})),
]


@pytest.mark.parametrize(("reason", "bad"), LINES, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(LINES)])
def test_a_bad_line_is_rejected_for_its_reason_and_the_others_go_on(write: Write, reason: str, bad: bytes) -> None:
    path = write("records.jsonl", GOOD + bad + line(bedrock("another good one")))

    insights = check(path)

    assert dict(insights.by_reason) == {reason: 1}
    assert (insights.accepted, insights.rejected) == (2, 1)
    found = insights.samples[Reason(reason)][0]
    assert (found.file, found.line) == (str(path), 2)
    assert found.message
    assert found.help


@pytest.mark.parametrize(("reason", "record"), OPENAI)
def test_a_bad_chat_record_is_rejected_for_its_reason(write: Write, reason: str, record: Any) -> None:
    path = write("records.jsonl", [openai(), record, openai({"role": "user", "content": "more"})])

    findings = list(read(path, "openai"))

    assert [type(found) for found in findings] == [Example, Rejection, Example]
    assert findings[1].reason == reason


@pytest.mark.parametrize(("reason", "record"), LOGS)
def test_a_bad_log_record_is_rejected_for_its_reason(write: Write, reason: str, record: Any) -> None:
    good = log(requestMetadata={"project": "Mine"})
    record = {"requestMetadata": {"project": "Mine"}, **record}
    path = write("log.json.gz", gzip.compress(line(good) + line(record) + line(good)))

    findings = list(
        read(
            path,
            "invocation_logs",
            where={"equals": {"project": "Mine"}},
            model="qwen.qwen2-5-7b-instruct-v1:0",
            limits=ReadLimits(multi_turn=False),
        )
    )

    assert [type(found) for found in findings] == [Example, Rejection, Example]
    assert findings[1].reason == reason
    assert findings[1].line == 2


BFCL = [
    ("multi_turn_not_supported", {**bfcl("a", "hi"), "question": [[], []]}),
    ("no_messages", {**bfcl("a", "hi"), "question": [[]]}),
    ("missing_field", {key: value for key, value in bfcl("a", "hi").items() if key != "function"}),
    ("bad_tools", {**bfcl("a", "hi"), "function": [{"description": "x"}]}),
    ("bad_role", {**bfcl("a", "hi"), "question": [[{"role": "robot", "content": "hi"}]]}),
    ("no_answer", bfcl("unanswered", "hi")),
]


@pytest.mark.parametrize(("reason", "record"), BFCL)
def test_a_bad_bfcl_question_is_rejected_for_its_reason(
    write_bfcl: Write, write: Write, reason: str, record: Any
) -> None:
    good = [bfcl("g1", "first question"), bfcl("g2", "second question")]
    path = write_bfcl("q.json", good)
    path.write_bytes(line(good[0]) + line(record) + line(good[1]))

    findings = [found for found in read(path, "bfcl") if not isinstance(found, DataWarning)]

    assert [type(found) for found in findings] == [Example, Rejection, Example]
    assert findings[1].reason == reason


def zipped(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


def in_a_tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


MANY = b"".join(line(bedrock(f"question {number} {os.urandom(40).hex()}")) for number in range(3_000))
FILES: list[tuple[str, str, bytes, int]] = [
    ("empty_file", "a.jsonl", b"", 0),
    ("empty_file", "a.jsonl", b"\n\r\n  \n", 0),
    ("empty_file", "a.jsonl", b"\xef\xbb\xbf", 0),
    ("wrong_extension", "a.csv", GOOD, 0),
    ("wrong_extension", "a.json", GOOD, 0),
    ("not_json_lines", "a.jsonl", json.dumps([bedrock()] * 3, indent=1).encode(), 0),
    ("not_json_lines", "a.jsonl", json.dumps([bedrock()] * 3).encode(), 0),
    ("not_json_lines", "a.jsonl", json.dumps(bedrock(), indent=2).encode(), 0),
    ("other_encoding", "a.jsonl", (GOOD.decode() * 300).encode("utf-16"), 0),
    ("other_encoding", "a.jsonl", (GOOD.decode() * 300).encode("utf-16-le"), 0),
    ("other_encoding", "a.jsonl", (GOOD.decode() * 300).encode("utf-16-be"), 0),
    ("other_encoding", "a.jsonl", (GOOD.decode() * 300).encode("utf-32"), 0),
    ("other_encoding", "a.jsonl.gz", gzip.compress((GOOD.decode() * 300).encode("utf-16")), 0),
    ("not_text", "a.jsonl", random.Random(1).randbytes(100_000), 0),
    ("not_text", "a.jsonl.gz", gzip.compress(random.Random(1).randbytes(100_000)), 0),
    ("not_text", "photo.png", b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(10_000), 0),
    ("not_text", "a.parquet", b"PAR1\x15\x04" + b"text " * 2_000, 0),
    ("other_compression", "a.jsonl.bz2", bz2.compress(GOOD), 0),
    ("other_compression", "a.jsonl", bz2.compress(GOOD), 0),
    ("other_compression", "a.jsonl.xz", lzma.compress(GOOD), 0),
    ("other_compression", "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + random.Random(1).randbytes(200), 0),
    ("other_compression", "a.zip", zipped(GOOD), 0),
    ("other_compression", "a.tar.gz", gzip.compress(in_a_tar(GOOD)), 0),
    ("other_compression", "a.jsonl.gz", gzip.compress(gzip.compress(GOOD)), 0),
    ("truncated_gzip", "a.jsonl.gz", gzip.compress(MANY)[:-100_000], 2),
    ("truncated_gzip", "a.jsonl.gz", gzip.compress(GOOD)[:-4], 1),
    ("truncated_gzip", "a.jsonl.gz", gzip.compress(GOOD)[:5], 0),
    ("corrupt_gzip", "a.jsonl.gz", b"\x1f\x8bnot gzip at all", 0),
    ("corrupt_gzip", "a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0\0\0\0\0\0\0\1", 0),
    ("corrupt_gzip", "a.jsonl.gz", gzip.compress(GOOD) + b"garbage", 1),
    ("unknown_format", "a.jsonl", b'{"a": 1}\n', 1),
]


@pytest.mark.parametrize(("reason", "name", "content", "least_line"), FILES)
def test_a_bad_file_is_rejected_for_its_reason(
    write: Write, reason: str, name: str, content: bytes, least_line: int
) -> None:
    path = write(name, content)

    rejected = [found for found in read(path) if isinstance(found, Rejection)]

    assert [found.reason for found in rejected] == [reason]
    assert rejected[0].line >= least_line
    if least_line == 0:
        assert rejected[0].line == 0


def test_the_message_names_the_encoding_and_the_help_converts_it(write: Write) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        (rejected,) = read(write("a.jsonl", (GOOD.decode() * 300).encode(encoding)))

        assert isinstance(rejected, Rejection)
        assert rejected.message.endswith(encoding.upper().replace("6-", "6"))
        assert "iconv -f UTF-16 -t UTF-8" in rejected.help


def test_what_stood_before_the_cut_of_a_gzip_file_is_read(write: Write) -> None:
    path = write("a.jsonl.gz", gzip.compress(MANY)[:-100_000])

    *examples, last = read(path)

    assert len(examples) > 100
    assert all(isinstance(found, Example) for found in examples)
    assert isinstance(last, Rejection)


def test_a_file_that_expands_without_end_is_given_up(write: Write) -> None:
    path = write("bomb.jsonl.gz", gzip.compress(b" " * 64_000_000, 9))

    (rejected,) = [found for found in read(path) if isinstance(found, Rejection)]

    assert rejected.reason == "gzip_bomb"


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")

    (rejected,) = read(tmp_path / "pipe.jsonl")

    assert rejected.reason == "not_a_file"


def test_links_in_circles_and_to_nowhere_do_no_harm(write: Write, tmp_path: Path) -> None:
    write("folder/good.jsonl", GOOD)
    (tmp_path / "folder" / "circle").symlink_to(tmp_path / "folder", target_is_directory=True)
    (tmp_path / "folder" / "loop.jsonl").symlink_to(tmp_path / "folder" / "loop.jsonl")
    (tmp_path / "folder" / "nowhere.jsonl").symlink_to(tmp_path / "absent")

    insights = check(tmp_path / "folder")

    assert insights.accepted == 1
    assert dict(insights.by_reason) == {"not_a_file": 2}


def test_an_unreadable_file_is_named(write: Write) -> None:
    path = write("secret.jsonl", GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")

    (rejected,) = read(path)

    assert rejected.reason == "unreadable_file"


def test_no_more_bytes_are_read_than_the_limit_allows(write: Write) -> None:
    path = write("a.jsonl", MANY)

    *examples, last = read(path, limits=ReadLimits(total_bytes=10_000))

    assert sum(len(line(bedrock("x" * 90))) for _ in examples) <= 12_000
    assert isinstance(last, Rejection)
    assert last.reason == "too_much_data"


def test_at_least_25_kinds_are_told_apart() -> None:
    kinds = {reason for reason, *_ in (*LINES, *OPENAI, *LOGS, *BFCL, *FILES)}

    assert len(kinds) >= 40


def test_every_code_has_a_help_text_and_no_code_changes_by_accident() -> None:
    assert all(len(reason.help) > 20 for reason in Reason)
    assert len({reason.value for reason in Reason}) == len(Reason)


def test_asked_and_said_are_good_records(write: Write) -> None:
    (found,) = read(write("a.json.gz", gzip.compress(line(log(asked("Hi"), said("Hello"))))))

    assert isinstance(found, Example)
