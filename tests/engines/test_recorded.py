"""A recorded teacher answers what it answered, and says what it was never asked."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from stillroom.engines import Entry, ModelConfig, ModelInfo, Request, ask, open_model, write_recording
from stillroom.errors import ModelError, NotRecorded
from stillroom.schema import Completion, GenerateParams, Message, ToolCall, ToolSpec, prompt_digest
from tests.engines.questions import DOTTED, WEATHER, question

INFO = ModelInfo("qwen.tiny", "2026-01-02T03:04:05Z", digest="ab" * 32, license="Apache-2.0")
HISTORY = (
    Message("system", "Be brief."),
    Message("user", "1+2?"),
    Message("assistant", "", (ToolCall("math.add", {"a": 1, "b": 2}),)),
    Message("tool", "3"),
    Message("user", "and 3+4?"),
)
ASKED = [
    question("one", WEATHER),
    question("one", DOTTED),
    question("one", DOTTED, constrain=True),
    question("no tools"),
    Request(HISTORY, (DOTTED,)),
]
SAID = [
    Completion(Message("assistant", "[get_weather(city='Oslo')] ü\u2028"), "x", "stop", 10, 5, 0.25),
    Completion(
        Message("assistant", "", (ToolCall("math.add", {"a": 1, "b": [2, None]}),)), "x", "tool_calls", 1, 2, 1.5
    ),
    Completion(Message("assistant", "[math.add(a=1"), "x", "length", 1, 2, 0.001),
    Completion(Message("assistant", ""), "x", "stop", 1, 1, 0.5),
    Completion(Message("assistant", "7 \ud800 😀"), "x", "refused", 1, 2, 2.0),
]
ENTRIES = [Entry(f"e{index}", *pair) for index, pair in enumerate(zip(ASKED, SAID, strict=True))]


def recorded(folder, **fields):
    return open_model(ModelConfig(engine="recorded", path=str(folder), **fields))


def only_file(folder):
    (file,) = [path for path in folder.iterdir() if path.name.startswith("answers")]
    return file


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
def test_what_was_recorded_is_answered(tmp_path, prompts, compress):
    write_recording(tmp_path / "r", ENTRIES, INFO, prompts=prompts, compress=compress)
    model = recorded(tmp_path / "r", name="Teacher")
    answers = ask(model, ASKED)
    for answer, said in zip(answers, SAID, strict=True):
        assert isinstance(answer, Completion)
        assert (answer.finish_reason, answer.latency_s) == (said.finish_reason, said.latency_s)
        assert (answer.input_tokens, answer.output_tokens, answer.model) == (
            said.input_tokens,
            said.output_tokens,
            "Teacher",
        )
        assert answer.message == said.message


def test_a_recording_with_prompts_needs_no_metadata(tmp_path):
    write_recording(tmp_path / "r", ENTRIES, INFO, prompts=True)
    file = only_file(tmp_path / "r")
    records = [json.loads(line) for line in file.read_text().split("\n") if line]
    for record in records:
        del record["requestMetadata"]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [answer.message.content for answer in ask(recorded(tmp_path / "r"), ASKED)] == [
        said.message.content for said in SAID
    ]


def test_without_prompts_the_recording_copies_none_of_their_words(tmp_path):
    write_recording(tmp_path / "r", [Entry("e", question("a secret prompt", WEATHER), SAID[0])], INFO)
    text = only_file(tmp_path / "r").read_text()
    assert "secret" not in text
    assert "Weather of a city" not in text


def test_the_same_answers_are_the_same_bytes(tmp_path):
    for compress in (False, True):
        one = write_recording(tmp_path / "one", ENTRIES, INFO, compress=compress)
        two = write_recording(tmp_path / "two", reversed(ENTRIES), INFO, compress=compress)
        assert {path.name: path.read_bytes() for path in one.iterdir()} == {
            path.name: path.read_bytes() for path in two.iterdir()
        }


def test_a_record_is_a_log_record_as_the_service_writes_it(tmp_path):
    write_recording(tmp_path / "r", ENTRIES[:1], INFO)
    (line,) = only_file(tmp_path / "r").read_text().strip().split("\n")
    record = json.loads(line)
    assert (record["schemaType"], record["schemaVersion"], record["operation"]) == (
        "ModelInvocationLog",
        "1.0",
        "Converse",
    )
    assert (record["modelId"], record["timestamp"]) == ("qwen.tiny", "2026-01-02T03:04:05Z")
    assert record["requestMetadata"] == {
        "exampleId": "e0",
        "promptSha256": prompt_digest(ASKED[0].messages, ASKED[0].tools),
        "modelSha256": "ab" * 32,
    }
    assert record["output"]["outputBodyJson"]["usage"] == {"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}
    manifest = json.loads((tmp_path / "r" / "recording.json").read_text())
    assert (manifest["license"], manifest["records"], manifest["modelSha256"]) == ("Apache-2.0", 1, "ab" * 32)


def test_a_prompt_that_was_not_recorded_says_what_to_do(tmp_path):
    write_recording(tmp_path / "r", ENTRIES, INFO)
    model = recorded(tmp_path / "r")
    changed = ToolSpec("get_weather", "Weather of a town", WEATHER.parameters)
    for request in (question("two", WEATHER), question("one", changed), question("one", WEATHER, constrain=True)):
        with pytest.raises(NotRecorded, match=r"write_recording") as caught:
            asyncio.run(model.generate(request.messages, request.tools, request.params))
        assert request.messages[-1].content in str(caught.value)


def test_other_settings_than_constrain_do_not_matter(tmp_path):
    write_recording(tmp_path / "r", ENTRIES, INFO)
    request = ASKED[0]
    answer = asyncio.run(
        recorded(tmp_path / "r").generate(request.messages, request.tools, GenerateParams(max_tokens=1, seed=5))
    )
    assert answer.message == SAID[0].message


def test_records_that_cannot_be_used_are_named_and_the_others_go_on(tmp_path, capsys):
    write_recording(tmp_path / "r", ENTRIES, INFO)
    file = only_file(tmp_path / "r")
    good = file.read_text()
    failed = json.dumps({"operation": "Converse", "modelId": "m", "errorCode": "ThrottlingException"})
    other = json.dumps({"operation": "InvokeModel", "modelId": "m"})
    file.write_text(f"not json\n[]\n3\n{failed}\n{other}\n\n{good}" + good[:50])
    model = recorded(tmp_path / "r")
    assert len(model) == len(ENTRIES)
    assert len(model.skipped) == 6
    assert "answers.jsonl:1: not JSON" in model.skipped[0]
    assert any("ThrottlingException" in reason for reason in model.skipped)
    assert "6 records cannot be used" in capsys.readouterr().err


def test_a_delivered_tree_is_read_and_a_cut_gzip_gives_what_it_has(tmp_path):
    write_recording(tmp_path / "r", ENTRIES, INFO, prompts=True)
    data = only_file(tmp_path / "r").read_bytes()
    folder = tmp_path / "AWSLogs" / "000000000000" / "BedrockModelInvocationLogs" / "2026"
    folder.mkdir(parents=True)
    (folder / "a.json.gz").write_bytes(gzip.compress(data))
    (folder / "b.json.gz").write_bytes(gzip.compress(data * 50)[:-30])
    (folder / "readme.txt").write_text("not a log")
    model = recorded(tmp_path / "AWSLogs")
    assert len(model) == len(ENTRIES)
    assert len(model.skipped) == 1


def test_streamed_answers_are_read(tmp_path):
    write_recording(tmp_path / "r", ENTRIES[:1], INFO)
    file = only_file(tmp_path / "r")
    record = json.loads(file.read_text())
    record["operation"] = "ConverseStream"
    record["output"]["outputBodyJson"] = [record["output"]["outputBodyJson"]]
    file.write_text(json.dumps(record))
    assert ask(recorded(file), ASKED[:1])[0].message == SAID[0].message


def test_answers_of_two_models_are_not_mixed(tmp_path):
    write_recording(tmp_path / "both" / "one", ENTRIES, INFO)
    write_recording(tmp_path / "both" / "two", ENTRIES[:1], ModelInfo("other.model", "2026-01-02T03:04:05Z"))
    # The first answer to a prompt stays, so the second model is seen only where it is chosen.
    assert recorded(tmp_path / "both", model="other.model").name == "other.model"
    write_recording(
        tmp_path / "both" / "two",
        [Entry("z", question("z"), SAID[0])],
        ModelInfo("other.model", "2026-01-02T03:04:05Z"),
    )
    with pytest.raises(ModelError, match=r"2 models: other.model, qwen.tiny"):
        recorded(tmp_path / "both")


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no recording"):
        recorded(tmp_path / "missing")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ModelError, match="no recorded answer"):
        recorded(tmp_path / "empty.jsonl")


def test_equal_recordings_have_equal_identities(tmp_path):
    write_recording(tmp_path / "a", ENTRIES, INFO)
    write_recording(tmp_path / "b", ENTRIES, INFO, compress=True)
    write_recording(tmp_path / "c", ENTRIES[1:], INFO)
    a, b, c = (recorded(tmp_path / name) for name in "abc")
    assert a.identity == b.identity != c.identity
