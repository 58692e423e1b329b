"""Records of `bedrock-conversation-2024`: prompts, labelled or not, as the hosted service takes them.

Rules are those of its published validator: exact schema version, nothing but the known members,
one text block per message, roles alternating from the user. Beyond it, on purpose: `system: []` is no
system prompt (a published notebook writes it), several turns (unless the limits say otherwise), and
tools as Converse has them (`toolConfig` on the record, toolUse and toolResult blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillroom.data.answers import example_of
from stillroom.data.config import ReadLimits
from stillroom.data.reasons import Reason, Reject, excerpt
from stillroom.data.shapes import a_list, a_mapping, a_string, no_others, parsed_tools, type_name
from stillroom.schema import Example, Message, Role, ToolCall, ToolSpec

SCHEMA_VERSION = "bedrock-conversation-2024"
RECORD = frozenset({"schemaVersion", "system", "messages", "toolConfig"})
MESSAGE = frozenset({"role", "content"})
SYSTEM_BLOCK = frozenset({"text", "type"})
TOOL_BLOCKS = frozenset({"toolUse", "toolResult"})
MEDIA_BLOCKS = frozenset({"image", "document", "video", "audio"})


def to_example(record: Mapping[str, Any], limits: ReadLimits, category: str, source: str) -> Example:
    """One record; an assistant's message at its end is the golden answer.

    Raises:
        Reject: with the reason and the path of the member at fault.
    """
    version = record.get("schemaVersion")
    if version != SCHEMA_VERSION:
        raise Reject(Reason.WRONG_SCHEMA_VERSION, _version_message(version))
    messages = _plain(record)
    if messages is None:
        no_others(record, RECORD)
        messages = system(record.get("system"), strict=True) + conversation(a_list(record, "messages"), strict=True)
    if not limits.multi_turn and sum(message.role == "user" for message in messages) > 1:
        raise Reject(Reason.MULTI_TURN, "has more than one user message; the student takes one")
    return example_of(messages, tools(record.get("toolConfig")), category, source, origin="golden")


def system(value: Any, *, strict: bool) -> tuple[Message, ...]:
    """The system prompt of a record or a Converse request; several blocks are joined unless `strict`."""
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise Reject(Reason.WRONG_TYPE, f"system must be a list of one text block, not {type_name(value)}")
    if strict and len(value) > 1:
        raise Reject(Reason.SYSTEM_BLOCKS, f"system has {len(value)} blocks; exactly one is allowed")
    texts = []
    for position, item in enumerate(value):
        where = f"system[{position}]"
        block = a_mapping(item, where)
        if strict:
            no_others(block, SYSTEM_BLOCK, where)
        elif "text" not in block:  # cachePoint, guardContent
            continue
        texts.append(_text(block, where))
    return (Message("system", "\n".join(texts)),) if texts else ()


def tools(config: Any) -> tuple[ToolSpec, ...]:
    """The tools of a `toolConfig`."""
    if config is None:
        return ()
    return parsed_tools(a_mapping(config, "toolConfig"), "toolConfig")


def conversation(items: list[Any], *, strict: bool) -> tuple[Message, ...]:
    """The turns of a record or a Converse request; `strict` asks for exactly one text block in each."""
    if not items:
        raise Reject(Reason.NO_MESSAGES, "messages is empty")
    messages: list[Message] = []
    for position, item in enumerate(items):
        where = f"messages[{position}]"
        entry = a_mapping(item, where)
        role = a_string(entry, "role", where)
        if role != "user" and role != "assistant":
            raise Reject(Reason.BAD_ROLE, f"{where}.role is {excerpt(role)!r}; user or assistant is allowed")
        if role != ("assistant" if position % 2 else "user"):
            raise Reject(Reason.ROLES_NOT_ALTERNATING, f"{where} is the {role}'s, out of turn")
        if strict:
            no_others(entry, MESSAGE, where)
        messages += turn(role, entry.get("content", entry), where, strict=strict)
    return tuple(messages)


def _plain(record: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The messages of a record that is nothing but texts, as nearly all are; any other takes the long way."""
    turns = record.get("messages")
    if type(turns) is not list or not turns or len(record) != (3 if "system" in record else 2):
        return None
    messages = []
    if "system" in record:
        text = _plain_text(record["system"])
        if text is None:
            return None
        messages.append(Message("system", text))
    role: Role = "user"
    for item in turns:
        if type(item) is not dict or len(item) != 2 or item.get("role") != role:
            return None
        text = _plain_text(item.get("content"))
        if text is None:
            return None
        messages.append(Message(role, text))
        role = "assistant" if role == "user" else "user"
    return tuple(messages)


def _plain_text(content: Any) -> str | None:
    """The text of content that is exactly `[{"text": "..."}]` and not blank."""
    if type(content) is list and len(content) == 1 and type(content[0]) is dict and len(content[0]) == 1:
        text = content[0].get("text")
        if type(text) is str and text and not text.isspace():
            return text
    return None


def turn(role: str, content: Any, where: str, *, strict: bool) -> list[Message]:
    """One turn: a message, and before it one for each tool result that it carries."""
    if not isinstance(content, list):
        if isinstance(content, Mapping) and "content" not in content and "role" in content:
            raise Reject(Reason.MISSING_FIELD, f"{where}.content is missing")
        raise Reject(Reason.WRONG_TYPE, f"{where}.content must be a list of one text block, not {type_name(content)}")
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for position, item in enumerate(content):
        path = f"{where}.content[{position}]"
        block = a_mapping(item, path)
        if "text" in block:
            if strict:
                no_others(block, SYSTEM_BLOCK, path)
            texts.append(_text(block, path))
        elif "toolUse" in block:
            calls.append(_call(block["toolUse"], f"{path}.toolUse"))
        elif "toolResult" in block:
            results.append(_result(block["toolResult"], f"{path}.toolResult"))
        elif strict or not {"cachePoint", "reasoningContent"} & block.keys():
            raise _unknown_block(block, path)
    if (strict and len(texts) > 1) or not (texts or calls or results):
        raise Reject(Reason.CONTENT_BLOCKS, f"{where}.content has {len(texts)} text blocks; exactly one is allowed")
    if calls and role != "assistant":
        raise Reject(Reason.BAD_TOOL_CALL, f"{where}: only the assistant may use tools")
    if results and role != "user":
        raise Reject(Reason.BAD_TOOL_CALL, f"{where}: tool results stand in the user's turn")
    own = [Message(role, "\n".join(texts), tuple(calls))] if texts or calls else []  # type: ignore[arg-type]
    return results + own


def _text(block: Mapping[str, Any], where: str) -> str:
    text = a_string(block, "text", where)
    if not text or text.isspace():
        raise Reject(Reason.BLANK_TEXT, f"{where}.text is blank")
    return text


def _call(value: Any, where: str) -> ToolCall:
    use = a_mapping(value, where)
    arguments = use.get("input")
    if not isinstance(arguments, dict):
        raise Reject(Reason.BAD_TOOL_CALL, f"{where}.input must be an object, not {type_name(arguments)}")
    return ToolCall(a_string(use, "name", where), arguments)


def _result(value: Any, where: str) -> Message:
    from stillroom.schema import canonical_json

    parts = []
    for position, item in enumerate(a_list(a_mapping(value, where), "content", where)):
        path = f"{where}.content[{position}]"
        block = a_mapping(item, path)
        if "text" in block:
            parts.append(a_string(block, "text", path))
        elif "json" in block:
            parts.append(canonical_json(block["json"]))
        else:
            raise _unknown_block(block, path)
    return Message("tool", "\n".join(parts))


def _unknown_block(block: Mapping[str, Any], where: str) -> Reject:
    media = next((name for name in block if name in MEDIA_BLOCKS), None)
    if media is not None:
        return Reject(Reason.NON_TEXT, f"{where} is of the kind {media}")
    if "type" in block or not block:
        return Reject(Reason.MISSING_FIELD, f"{where}.text is missing")
    return Reject(Reason.UNKNOWN_FIELD, f"{where} has {excerpt(next(iter(block)))!r} and no text")


def _version_message(version: Any) -> str:
    if version is None:
        return "schemaVersion is missing"
    if version == "bedrock-conversion-2024":
        return "schemaVersion is 'bedrock-conversion-2024', a spelling mistake of the service's documentation"
    return f"schemaVersion is {excerpt(version)!r}"
