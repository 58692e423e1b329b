"""The records that flow through Stillroom, and the protocol that every model speaks.

Everything learnable is an `Example`; everything that answers is a `ChatModel`. Both are
plain frozen dataclasses: tokens exist only inside models, engines, teacher and training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "validation", "test"]
Origin = Literal["golden", "teacher"]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One callable tool. `parameters` is a JSON Schema object (`type: object`), whatever dialect it came in."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call: a tool's name and its arguments as JSON values (tuples are lists)."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. An assistant's tool calls stand in `tool_calls`, or as text in `content` where a dialect is text."""

    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """An answer to learn from: who gave it, and what it says."""

    message: Message
    origin: Origin
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, what may be learnt from it, and what counts as right.

    Attributes:
        id: stable name; the id given in the source, or the digest of the prompt.
        messages: the prompt; the last one is not the assistant's.
        tools: what the model may call.
        targets: answers to learn from, best first; empty means unlabelled.
        expected: what scoring accepts, in the task's own form (function calling: a list of
            `{name: {parameter: [acceptable values]}}`, as BFCL has it; classification: a label;
            free text: a reference). None: cannot be scored.
        category: the group that results are shown by, such as `simple`.
        split: which split it was put in.
        source: `file:line` that it came from.
        parents: ids of the examples that it was made from.
        metadata: whatever its source said about it (request metadata, for instance).
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    targets: tuple[Target, ...] = ()
    expected: Any = None
    category: str = ""
    split: Split | None = None
    source: str = ""
    parents: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerateParams:
    """How to answer. Temperature 0 is greedy.

    Attributes:
        constrain: restrict the answer to valid calls of the given tools.
        calls_first: only an answer that begins with calls is of use, so an engine may end one that begins with words.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    constrain: bool = False
    calls_first: bool = False


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer and what it took.

    Attributes:
        message: the assistant's turn.
        model: name of the model that answered.
        finish_reason: `stop`, `length` (cut by max_tokens), `tool_calls` or `refused`.
        input_tokens, output_tokens: as the engine counted them.
        latency_s: from request to last token; None where it was not measured alone (batched).
        cost_usd: what this call cost, or 0 for a local model.
    """

    message: Message
    model: str
    finish_reason: str = "stop"
    input_tokens: int = 0
    output_tokens: int = 0
    latency_s: float | None = None
    cost_usd: float = 0.0


@runtime_checkable
class ChatModel(Protocol):
    """What the teacher, a local student, a remote endpoint, a router and a scripted fake all are."""

    @property
    def name(self) -> str: ...

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation.

        Raises:
            ModelUnavailable: may work later. ModelRefused: will not. ModelError: anything else.
        """
        ...


def to_dict(record: Any) -> Any:
    """A record as plain JSON values; fields at their default are left out, so old files stay readable."""
    if isinstance(record, ToolSpec):
        return {"name": record.name, "description": record.description, "parameters": record.parameters}
    if isinstance(record, ToolCall):
        return {"name": record.name, "arguments": record.arguments}
    if isinstance(record, Message):
        out: dict[str, Any] = {"role": record.role, "content": record.content}
        if record.tool_calls:
            out["tool_calls"] = [to_dict(call) for call in record.tool_calls]
        return out
    if isinstance(record, Target):
        return {"message": to_dict(record.message), "origin": record.origin, "model": record.model}
    if isinstance(record, Completion):
        out = {name: getattr(record, name) for name in Completion.__slots__}
        return {**out, "message": to_dict(record.message)}
    if isinstance(record, Example):
        out = {
            "id": record.id,
            "messages": [to_dict(message) for message in record.messages],
            "tools": [to_dict(tool) for tool in record.tools],
            "targets": [to_dict(target) for target in record.targets],
            "parents": list(record.parents),
        }
        for name in ("expected", "category", "split", "source", "metadata"):
            value = getattr(record, name)
            if value:
                out[name] = value
        return out
    raise TypeError(f"not a record: {type(record).__name__}")


def message_from_dict(data: Mapping[str, Any]) -> Message:
    """The inverse of `to_dict` for a message."""
    calls = tuple(ToolCall(call["name"], call["arguments"]) for call in data.get("tool_calls", ()))
    return Message(data["role"], data.get("content", ""), calls)


def example_from_dict(data: Mapping[str, Any]) -> Example:
    """The inverse of `to_dict` for an example."""
    return Example(
        id=data["id"],
        messages=tuple(message_from_dict(message) for message in data["messages"]),
        tools=tuple(ToolSpec(**tool) for tool in data.get("tools", ())),
        targets=tuple(
            Target(message_from_dict(target["message"]), target["origin"], target.get("model"))
            for target in data.get("targets", ())
        ),
        expected=data.get("expected"),
        category=data.get("category", ""),
        split=data.get("split"),
        source=data.get("source", ""),
        parents=tuple(data.get("parents", ())),
        metadata=data.get("metadata", {}),
    )


def completion_from_dict(data: Mapping[str, Any]) -> Completion:
    """The inverse of `to_dict` for a completion."""
    return Completion(**{**data, "message": message_from_dict(data["message"])})


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """SHA-256, as 64 hex digits, of a JSON value's canonical text."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def prompt_digest(messages: Sequence[Message], tools: Sequence[ToolSpec] = (), *, constrain: bool = False) -> str:
    """What identifies a question, whoever is asked: its messages, its tools, and whether calls are constrained."""
    question = {"messages": [to_dict(m) for m in messages], "tools": [to_dict(t) for t in tools]}
    return digest({**question, "constrain": True} if constrain else question)
