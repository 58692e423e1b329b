"""The shipped chat template: what the student reads, and that it writes calls as `render_calls` does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.errors import ConfigError
from stillroom.models import chat_template_text, encode_prompt, encode_target, load_tokenizer
from stillroom.models.prompts import end_of_turn_id, prompt_text, target_text
from stillroom.schema import Message, ToolCall, ToolSpec
from stillroom.toolcalls import render_calls

WEATHER = ToolSpec(
    "get_weather",
    "Retrieves the weather.",
    {
        "type": "object",
        "required": ["location"],
        "properties": {
            "location": {"type": "string", "description": "City and state."},
            "unit": {"type": "string", "description": "The unit.", "enum": ["metric", "imperial"], "default": "metric"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "options": {
                "type": "object",
                "description": "More.",
                "required": ["a"],
                "properties": {"a": {"type": "string", "description": "An a."}, "b": {"type": ["integer", "null"]}},
            },
        },
    },
)
SYSTEM = """<|im_start|>system
{before}Answer with function calls only, as [name(parameter=value)].
Functions:
get_weather(location: str, unit: str = "metric", days: list[int] = ..., \
options: {{"a": str, "b": int | None = ...}} = ...): Retrieves the weather.
- location: City and state.
- unit: The unit. One of "metric", "imperial".
- options: More.
- options.a: An a.
ping()<|im_end|>
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_student):
    return load_tokenizer(tiny_student, chat_template="chatml-tools")


def test_tools_are_shown_as_signatures_in_the_system_turn(tokenizer):
    question = "<|im_start|>user\nIs it raining?<|im_end|>\n<|im_start|>assistant\n"
    tools = (WEATHER, ToolSpec("ping"))
    plain = [Message("user", "Is it raining?")]
    assert prompt_text(tokenizer, plain, tools) == SYSTEM.format(before="") + question
    ruled = [Message("system", "Be brief."), *plain]
    assert prompt_text(tokenizer, ruled, tools) == SYSTEM.format(before="Be brief.\n\n") + question
    assert prompt_text(tokenizer, plain) == question


def test_a_conversation_with_calls_and_results_is_rendered_turn_by_turn(tokenizer):
    call = ToolCall("get_weather", {"location": 'Ünï "q"\n', "days": [1, 2], "x": {"a": 1.5, "b": None, "c": True}})
    turns = [Message("user", "hi"), Message("assistant", "", (call,)), Message("tool", "22"), Message("user", "so?")]
    assert prompt_text(tokenizer, turns) == (
        "<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n{render_calls([call])}<|im_end|>\n"
        "<|im_start|>tool\n22<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abcß_", max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
calls = st.lists(
    st.builds(
        ToolCall,
        st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8})?", fullmatch=True),
        st.dictionaries(st.from_regex(r"[a-z_][a-z_0-9]{0,6}", fullmatch=True), json_values, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(calls=calls)
def test_the_template_writes_calls_as_render_calls_does(tokenizer, calls):
    rendered = prompt_text(tokenizer, [Message("user", "x"), Message("assistant", "", tuple(calls))])
    assert f"<|im_start|>assistant\n{render_calls(calls)}<|im_end|>\n<|im_start|>assistant\n" in rendered


def test_prompt_and_target_together_are_the_finished_conversation(tokenizer):
    answer = Message("assistant", "", (ToolCall("ping", {}),))
    ids = encode_prompt(tokenizer, [Message("user", "x")]) + encode_target(tokenizer, answer)
    finished = [{"role": "user", "content": "x"}, {"role": "assistant", "content": target_text(answer)}]
    assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(finished, tokenize=False)
    assert ids[-1] == end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_would_drop_the_tools_is_refused(tiny_student):
    blind = load_tokenizer(tiny_student, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert encode_prompt(blind, [Message("user", "x")])
    with pytest.raises(ConfigError, match="does not show tools"):
        encode_prompt(blind, [Message("user", "x")], (WEATHER,))
    with pytest.raises(ConfigError, match="no chat template"):
        encode_prompt(load_tokenizer(tiny_student), [Message("user", "x")])
    with pytest.raises(ConfigError, match="chatml-tools"):
        chat_template_text("chatml-tool")
