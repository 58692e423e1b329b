"""Conversations to token ids: the prompt through the chat template, the answer as the student will say it.

Promise: prompt and target are tokenised apart, as they are when the model generates, so what is
learnt is what is later asked for. An answer's calls are Python text, as `toolcalls.render_calls` has it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillroom.errors import ConfigError
from stillroom.schema import Message, ToolSpec

TEMPLATES = Path(__file__).parent / "templates"


def encode_prompt(model: Any, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> list[int]:
    """Token ids of a conversation up to where the assistant speaks next.

    Args:
        model: a `Loaded`, or a tokenizer that carries a chat template.
        messages: the turns so far.
        tools: what may be called; shown by the chat template.

    Raises:
        ConfigError: there is no chat template, or it would silently leave the tools out.
    """
    tokenizer = getattr(model, "tokenizer", model)
    return list(tokenizer.encode(prompt_text(tokenizer, messages, tools), add_special_tokens=False))


def prompt_text(tokenizer: Any, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
    """The text that `encode_prompt` tokenises."""
    template = tokenizer.chat_template
    if not template:
        raise ConfigError("the model has no chat template.\nhelp: set `chat_template: chatml-tools`, or a .jinja file.")
    if tools and "tools" not in template:
        raise ConfigError(
            "the model's own chat template does not show tools, so they would be left out of the prompt.\n"
            "help: set `chat_template: chatml-tools`, or a .jinja file that renders `tools`."
        )
    return str(
        tokenizer.apply_chat_template(
            [_openai_message(message) for message in messages],
            tools=[_openai_tool(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def encode_target(tokenizer: Any, message: Message) -> list[int]:
    """Token ids of the assistant's turn as the student learns to say it, the end-of-turn token included."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return [*tokenizer.encode(target_text(message), add_special_tokens=False), end_of_turn_id(tokenizer)]


def target_text(message: Message) -> str:
    """What the assistant says: its text, then its calls as Python text."""
    from stillroom.toolcalls import render_calls

    parts = [message.content] if message.content else []
    if message.tool_calls:
        parts.append(render_calls(message.tool_calls, dialect="python"))
    return "\n".join(parts)


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that ends an assistant's turn: the special token that the template writes there, else end-of-text."""
    template = tokenizer.chat_template
    return _end_of_turn(tokenizer, template) if template else int(tokenizer.eos_token_id)


@functools.lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Any, template: str) -> int:
    mark = "an answer"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": mark}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template))
    after = tokenizer.encode(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return int(after[0]) if after and after[0] in special else int(tokenizer.eos_token_id)


def chat_template_text(name: str) -> str:
    """The Jinja text meant by `name`: a template that we ship, a `.jinja` file, or the text itself."""
    if "{%" in name or "{{" in name:
        return name
    shipped = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    path = TEMPLATES / f"{name}.jinja" if name in shipped else Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"no chat template {name!r}: no such file, and shipped are {', '.join(shipped)}.")
    return path.read_text(encoding="utf-8")


def _openai_message(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn


def _openai_tool(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}
