"""A student small enough to train in a second, and records for it; real files throughout."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest

BUCKETS = itertools.count()
MISSING = re.compile(r"not installed|could not import|No module named", re.IGNORECASE)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where CI runs, a test that was skipped for a missing tool is a failure: everything is installed there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.longrepr for report in reporter.stats.get("skipped", [])] if reporter else []
    missing = [reason for reason in map(str, skipped) if MISSING.search(reason)]
    if os.environ.get("CI") and missing:
        reporter.write_line(f"skipped for a missing tool, which fails here: {missing}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, as a Transformers directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=SPECIAL[0], eos_token="<|im_end|>", pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:2],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3-compatible server for all tests that do not break it."""
    from tests.s3_server import Server

    server = Server(tmp_path_factory.mktemp("s3") / "data")
    yield server
    server.kill()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """boto3's configuration leads to `s3_server`."""
    configure_s3(monkeypatch, s3_server.url)
    return s3_server


@pytest.fixture
def bucket(s3) -> Path:
    """The folder of a fresh bucket's objects; its name is the bucket's."""
    return s3.make_bucket(f"bucket-{next(BUCKETS)}")


@pytest.fixture
def network(s3, monkeypatch):
    """A network between boto3 and the server, which a test may break."""
    from tests.s3_server import Network

    network = Network(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
    yield network
    network.close()


def configure_s3(monkeypatch, url: str) -> None:
    from tests.s3_server import ACCESS, SECRET

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)


CITIES = ["Oslo", "Rome", "Lima", "Cairo", "Quito", "Delhi", "Perth", "Kyoto", "Tunis", "Turin"]


def weather_record(index: int, *, answer: bool) -> dict:
    """An OpenAI chat record with a tool of its own and, if asked, the right call."""
    city, name = CITIES[index % len(CITIES)], f"weather_{index}"
    tool = {
        "name": name,
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    messages: list[dict] = [{"role": "user", "content": f"Report number {index}: what is it like in {city}?"}]
    if answer:
        call = {"name": name, "arguments": json.dumps({"city": city})}
        messages.append({"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]})
    return {"messages": messages, "tools": [{"type": "function", "function": tool}]}


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
