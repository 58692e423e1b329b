"""Chat templates come from strangers: they render what Transformers renders, and reach nothing else."""

from __future__ import annotations

import pytest

from stillroom.engines.templates import ChatTemplate
from stillroom.errors import ModelError, ModelRefused
from stillroom.schema import Message, ToolCall
from tests.engines.questions import DOTTED, WEATHER

CONVERSATION = (
    Message("system", 'Be <brief> & "kind".'),
    Message("user", "1 + 2?"),
    Message("assistant", "", (ToolCall("math.add", {"a": 1, "b": [1.5, None, True, "é"]}),)),
    Message("tool", "3"),
)


@pytest.mark.parametrize("tools", [(), (DOTTED,), (DOTTED, WEATHER)])
def test_the_shipped_template_renders_as_transformers_renders_it(tiny_student, tools):
    from transformers import AutoTokenizer

    from stillroom.models import chat_template_text
    from stillroom.models.prompts import prompt_text

    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    tokenizer.chat_template = chat_template_text("chatml-tools")
    ours = ChatTemplate(tokenizer.chat_template, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    assert ours.knows_tools
    assert ours.render(CONVERSATION, tools) == prompt_text(tokenizer, CONVERSATION, tools)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_hostile_template_reaches_nothing(attack):
    with pytest.raises(ModelRefused):
        ChatTemplate(attack).render(CONVERSATION)


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(ModelRefused, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(CONVERSATION)


def test_bad_jinja_is_an_error_with_its_line():
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("x\n{% for %}")
