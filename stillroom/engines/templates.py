"""Chat templates without a tokenizer: Jinja in a sandbox, with what Hugging Face's templates expect.

A template comes with a model that somebody else made, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stillroom.errors import ModelError, ModelRefused
from stillroom.schema import Message, ToolSpec


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        bos, eos: the model's special tokens as text, which templates may write.
        where: named in errors.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", where: str = "chat template") -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the {where} is not valid Jinja: line {error.lineno}: {error.message}.\n"
                "help: give another one as `chat_template`."
            ) from error
        self.source, self.where, self._tokens = source, where, {"bos_token": bos, "eos_token": eos}

    @property
    def knows_tools(self) -> bool:
        """Whether the template mentions `tools` at all; many do not, and drop them without a word."""
        return re.search(r"\btools\b", self.source) is not None

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
        """The prompt as text, up to where the assistant begins to write.

        Raises:
            ModelRefused: the template does not accept this conversation.
        """
        try:
            return self._template.render(
                messages=[message_for_template(message) for message in messages],
                tools=[tool_for_template(tool) for tool in tools] or None,
                add_generation_prompt=True,
                **self._tokens,
            )
        except Exception as error:  # the template is somebody else's program and may raise anything
            raise ModelRefused(
                f"the {self.where} does not accept this conversation: {error}.\n"
                "help: check the order of roles, or give another template as `chat_template`."
            ) from error


def message_for_template(message: Message) -> dict[str, Any]:
    """A message in the shape that Hugging Face's chat templates read."""
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return out


def tool_for_template(tool: ToolSpec) -> dict[str, Any]:
    """A tool in the shape that Hugging Face's chat templates read (OpenAI's)."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML characters; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)
