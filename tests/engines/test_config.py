"""Engines are described without being loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from stillroom.engines import ModelConfig
from stillroom.engines.names import SafeNames
from stillroom.schema import ToolSpec


@pytest.mark.parametrize("engine", ["transformers", "llama.cpp", "openai", "bedrock", "recorded"])
def test_an_engine_says_what_it_needs(engine):
    with pytest.raises(ValidationError, match=r"needs `(path|url|model)`"):
        ModelConfig(engine=engine)


def test_unknown_keys_fail():
    with pytest.raises(ValidationError):
        ModelConfig(engine="recorded", path="x", temprature=1)


def test_nothing_heavy_is_imported_until_an_engine_is_opened():
    code = (
        "import sys, stillroom.engines, stillroom.teacher\n"
        "from stillroom.engines import AnswerCache, Budget, ModelConfig, ask, open_model, write_recording\n"
        "from stillroom.teacher import TeacherConfig, label\n"
        "heavy = {'torch', 'transformers', 'httpx', 'boto3', 'numpy', 'xllamacpp', 'jinja2'} & sys.modules.keys()\n"
        "sys.exit(str(sorted(heavy)) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).stderr == b""


def test_an_engine_that_is_not_installed_says_what_to_install(monkeypatch):
    from stillroom.engines import open_model
    from stillroom.errors import ModelError

    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "stillroom.engines.bedrock", raising=False)
    with pytest.raises(ModelError, match=r"stillroom\[bedrock\]"):
        open_model(ModelConfig(engine="bedrock", model="a.b"))


def test_safe_names_are_distinct_and_come_back():
    tools = [ToolSpec(name) for name in ("a.b", "a_b", "a b", "x" * 80, "x" * 79, "ü", "")]
    names = SafeNames(tools)
    written = [tool.name for tool in names.tools(tools)]
    assert len(set(written)) == len(tools)
    assert all(0 < len(name) <= 64 for name in written)
    assert [names.own(name) for name in written] == [tool.name for tool in tools]
    assert names.own("invented") == "invented"
