"""Request and response bodies of InvokeModel, as the model makers define them.

Read: Llama, Anthropic (messages and the older text completions), Nova, Titan, Mistral, Cohere's chat, and
OpenAI's form, which DeepSeek, Qwen and gpt-oss use. Told apart by their members, not by the model's
name, since a name may be an ARN. An unknown body is rejected as such; nothing is guessed.

Source: the providers' pages under "Inference request parameters and response fields" of the service.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stillroom.data import bedrock, openai_chat
from stillroom.data.config import ReadLimits
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_list, a_mapping, a_string, parsed_tools, type_name
from stillroom.schema import Message, ToolSpec

Call = tuple[list[Message], tuple[ToolSpec, ...], Message, Any]
"""Prompt, tools, answer, and why the answer stopped."""

Prompt = tuple[list[Message], tuple[ToolSpec, ...]]
_LLAMA_TURN = re.compile(r"<\|start_header_id\|>([a-z]+)<\|end_header_id\|>(.*?)(?=<\|start_header_id\|>|$)", re.DOTALL)
_LLAMA_END = re.compile(r"<\|(?:eot_id|eom_id|end_of_text|begin_of_text)\|>")
_LABELLED = re.compile(r"(?:^|\n)\s*(Human|User|Assistant|Bot|System):")
_ROLE_OF: dict[str, Any] = {
    "human": "user",
    "user": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "ipython": "tool",
    "tool": "tool",
    "chatbot": "assistant",
}


def read_call(request: dict[str, Any], response: dict[str, Any]) -> Call:
    """A logged InvokeModel call; the response is assembled if it was streamed.

    Raises:
        Reject: `unknown_body_format`, or what is wrong in a known one.
    """
    messages, tools = _request(request)
    answer, stop = _response(response)
    return messages, tools, answer, stop


def converse_answer(response: Mapping[str, Any]) -> tuple[Message, Any]:
    """The answer of a Converse response and its stop reason."""
    where = "output.message"
    message = a_mapping(a_mapping(response.get("output"), "output").get("message"), where)
    turns = bedrock.turn("assistant", message.get("content"), where, strict=False)
    return turns[-1], response.get("stopReason")


def _request(body: dict[str, Any]) -> Prompt:
    if isinstance(body.get("prompt"), str):
        return _text_prompt(body["prompt"]), ()
    if isinstance(body.get("inputText"), str):
        return _labelled(body["inputText"]), ()
    if isinstance(body.get("message"), str) and "messages" not in body:
        return _cohere(body), ()
    if isinstance(body.get("messages"), list):
        if "anthropic_version" in body:
            return _anthropic(body)
        if _has_untyped_blocks(body["messages"]):
            messages = bedrock.system(body.get("system"), strict=False)
            messages += bedrock.conversation(body["messages"], strict=False)
            return list(messages), bedrock.tools(body.get("toolConfig"))
        known = {name: value for name, value in body.items() if name in ("messages", "tools")}
        return openai_chat.conversation(known, ReadLimits())
    raise Reject(Reason.UNKNOWN_BODY, f"a request with the members {excerpt(', '.join(body) or '(none)')}")


def _response(body: dict[str, Any]) -> tuple[Message, Any]:
    for member, take in _RESPONSES.items():
        if member in body:
            message, stop = take(body)
            if not message.content.strip() and not message.tool_calls:
                raise Reject(Reason.BLANK_TEXT, "the answer is blank")
            return message, stop
    raise Reject(Reason.UNKNOWN_BODY, f"a response with the members {excerpt(', '.join(body) or '(none)')}")


def _generation(body: dict[str, Any]) -> tuple[Message, Any]:
    return _said(a_string(body, "generation", "output")), body.get("stop_reason")


def _completion(body: dict[str, Any]) -> tuple[Message, Any]:
    return _said(a_string(body, "completion", "output")), body.get("stop_reason")


def _text(body: dict[str, Any]) -> tuple[Message, Any]:
    return _said(a_string(body, "text", "output")), body.get("finish_reason")


def _results(body: dict[str, Any]) -> tuple[Message, Any]:
    result = _only(body, "results")
    return _said(a_string(result, "outputText", "output.results[0]")), result.get("completionReason")


def _outputs(body: dict[str, Any]) -> tuple[Message, Any]:
    output = _only(body, "outputs")
    return _said(a_string(output, "text", "output.outputs[0]")), output.get("stop_reason")


def _choices(body: dict[str, Any]) -> tuple[Message, Any]:
    choice = _only(body, "choices")
    stop = choice.get("finish_reason") or choice.get("stop_reason")
    if "text" in choice:
        return _said(a_string(choice, "text", "output.choices[0]")), stop
    entry = {**a_mapping(choice.get("message"), "output.choices[0].message"), "role": "assistant"}
    return openai_chat.message(entry, "output.choices[0].message", ReadLimits()), stop


def _content(body: dict[str, Any]) -> tuple[Message, Any]:
    (*_, message) = _anthropic_turn("assistant", a_list(body, "content", "output"), "output")
    return message, body.get("stop_reason")


_RESPONSES: dict[str, Callable[[dict[str, Any]], tuple[Message, Any]]] = {
    "output": converse_answer,
    "generation": _generation,
    "content": _content,
    "results": _results,
    "outputs": _outputs,
    "choices": _choices,
    "completion": _completion,
    "text": _text,
}


def _said(text: str) -> Message:
    return Message("assistant", text.strip())


def _only(body: dict[str, Any], name: str) -> dict[str, Any]:
    items = a_list(body, name, "output")
    if not items:
        raise Reject(Reason.MISSING_BODY, f"output.{name} is empty")
    return a_mapping(items[0], f"output.{name}[0]")


def _text_prompt(prompt: str) -> list[Message]:
    """A prompt with its template already applied, back to turns: Llama 3, Llama 2 and Mistral, Claude 2, or plain."""
    if "<|start_header_id|>" in prompt:
        turns = [(role, _LLAMA_END.sub("", text).strip()) for role, text in _LLAMA_TURN.findall(prompt)]
        return _turns(turns)
    if "[INST]" in prompt:
        return _turns([turn for part in prompt.split("[INST]")[1:] for turn in _inst_turns(part)])
    return _labelled(prompt)


def _inst_turns(part: str) -> list[tuple[str, str]]:
    """What follows one `[INST]`: perhaps a system text, a question, perhaps its answer."""
    asked, _, answered = part.partition("[/INST]")
    before, opened, rest = asked.partition("<<SYS>>")
    system, closed, question = rest.partition("<</SYS>>")
    turns = [("system", system.strip()), ("user", (before + question).strip())] if opened and closed else []
    turns = turns or [("user", asked.strip())]
    return [*turns, ("assistant", answered.replace("</s>", "").replace("<s>", "").strip())]


def _labelled(prompt: str) -> list[Message]:
    """`Human: ... Assistant:` or `User: ... Bot:`; without labels, all of it is the user's."""
    marks = list(_LABELLED.finditer(prompt))
    if not marks or (prompt[: marks[0].start()].strip() and len(marks) == 1):
        return _turns([("user", prompt.strip())])
    turns = [("system", prompt[: marks[0].start()].strip())]
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        turns.append((mark.group(1).lower(), prompt[mark.end() : after.start() if after else None].strip()))
    return _turns(turns)


def _turns(turns: list[tuple[str, str]]) -> list[Message]:
    unknown = next((role for role, _ in turns if role not in _ROLE_OF), None)
    if unknown is not None:
        raise Reject(Reason.BAD_ROLE, f"the prompt has a turn of the role {excerpt(unknown)!r}")
    messages = [Message(_ROLE_OF[role], text) for role, text in turns if text]
    if not any(message.role == "user" for message in messages):
        raise Reject(Reason.BLANK_TEXT, "the prompt says nothing")
    return messages


def _cohere(body: dict[str, Any]) -> list[Message]:
    turns = [("system", body["preamble"])] if isinstance(body.get("preamble"), str) else []
    for position, item in enumerate(body.get("chat_history") or []):
        where = f"input.chat_history[{position}]"
        turns.append((a_string(a_mapping(item, where), "role", where).lower(), a_string(item, "message", where)))
    return _turns([*turns, ("user", body["message"].strip())])


def _anthropic(body: dict[str, Any]) -> Prompt:
    messages: list[Message] = []
    system = body.get("system")
    if isinstance(system, str) and system.strip():
        messages.append(Message("system", system))
    elif isinstance(system, list):
        messages += bedrock.system(system, strict=False)
    for position, item in enumerate(body["messages"]):
        where = f"input.messages[{position}]"
        role = a_string(a_mapping(item, where), "role", where)
        if role not in ("user", "assistant"):
            raise Reject(Reason.BAD_ROLE, f"{where}.role is {excerpt(role)!r}")
        messages += _anthropic_turn(role, item.get("content"), where)
    tools = body.get("tools")
    return messages, _anthropic_tools(tools) if tools else ()


def _anthropic_turn(role: str, content: Any, where: str) -> list[Message]:
    """Anthropic's blocks as those of Converse, which say the same."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list):
        raise Reject(Reason.WRONG_TYPE, f"{where}.content must be text or a list of blocks, not {type_name(content)}")
    converted: list[dict[str, Any]] = []
    for position, item in enumerate(blocks):
        path = f"{where}.content[{position}]"
        block = a_mapping(item, path)
        kind = a_string(block, "type", path)
        if kind == "text":
            converted.append({"text": block.get("text")})
        elif kind == "tool_use":
            converted.append({"toolUse": {"name": block.get("name"), "input": block.get("input")}})
        elif kind == "tool_result":
            inner = block.get("content", "")
            inner = [{"text": inner}] if isinstance(inner, str) else inner
            converted.append({"toolResult": {"content": inner}})
        elif kind not in ("thinking", "redacted_thinking"):
            raise Reject(Reason.NON_TEXT, f"{path} is of the kind {excerpt(kind)}")
    return bedrock.turn(role, converted, where, strict=False)


def _anthropic_tools(value: Any) -> tuple[ToolSpec, ...]:
    if not isinstance(value, list):
        raise Reject(Reason.BAD_TOOLS, f"input.tools must be a list, not {type_name(value)}")
    specs = []
    for position, item in enumerate(value):
        tool = a_mapping(item, f"input.tools[{position}]")
        shown: dict[str, Any] = {name: tool[name] for name in ("name", "description") if name in tool}
        specs.append({**shown, "parameters": tool.get("input_schema", {"type": "object", "properties": {}})})
    return parsed_tools(specs, "input.tools")


def _has_untyped_blocks(messages: list[Any]) -> bool:
    """Whether messages are in Converse's form, as Nova has it: blocks without a `type`."""
    content = messages[0].get("content") if messages and isinstance(messages[0], dict) else None
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict) and "type" not in content[0]
