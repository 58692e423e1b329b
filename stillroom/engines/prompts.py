"""The system prompts that show tools to a model whose chat template or server does not know them.

`tool_format: python` asks for `[f(a=1)]`; the JSON form is for servers that constrain answers by a JSON
schema only. The text decides the answers, so its digest is part of what identifies an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from stillroom.schema import Message, ToolSpec, digest, to_dict

PYTHON_TOOLS = (
    "You are an expert in composing functions. Given a question and a set of functions, answer with the function "
    "call that serves the question, and nothing else, in the form [func_name(param=value, ...)]. Use only the "
    "functions listed, with every required parameter. Here are the functions in JSON:\n"
)
JSON_TOOLS = (
    "Answer the question with calls of the functions below and nothing else, in the form "
    '{"calls": [{"name": function, "arguments": {parameter: value}}]}. Here are the functions in JSON:\n'
)
PYTHON_PROMPT = digest({"instruction": PYTHON_TOOLS, "layout": 1})
JSON_PROMPT = digest({"instruction": JSON_TOOLS, "layout": 1})


def with_python_tools(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
    """The conversation with `tools` written into its system prompt, calls as text, and tool results as the user's.

    A system message of the conversation's own comes first. Without tools the conversation is unchanged but for calls.
    """
    return _with_tools(messages, tools, PYTHON_TOOLS)


def with_json_tools(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> tuple[Message, ...]:
    """The same, asking for calls as JSON."""
    return _with_tools(messages, tools, JSON_TOOLS)


def _with_tools(messages: Sequence[Message], tools: Sequence[ToolSpec], instruction: str) -> tuple[Message, ...]:
    rest = [_as_text(message) for message in messages if message.role != "system"]
    own = [message.content for message in messages if message.role == "system"]
    if not tools:
        return (*(Message("system", text) for text in own), *rest)
    listing = instruction + "\n".join(json.dumps(to_dict(tool), ensure_ascii=False) for tool in tools)
    return (Message("system", "\n\n".join([*own, listing])), *rest)


def _as_text(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"Result: {message.content}")
    if message.tool_calls:
        from stillroom.toolcalls import render_calls

        calls = render_calls(message.tool_calls, "python")
        return Message(message.role, f"{message.content}\n{calls}" if message.content else calls)
    return message
