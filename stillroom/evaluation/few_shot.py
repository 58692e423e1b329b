"""Examples shown to a model at its best: the same ones, as the same text, for every model.

They stand in the system prompt, each with its own tools written as a signature, since earlier turns would
call tools that the item does not offer, and endpoints refuse tool calls without results. Short ones are
chosen: on a small machine the length of the prompt is what an evaluation costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.evaluation.config import EvalConfig
from stillroom.schema import Example, Message, ToolSpec

INTRODUCTION = {
    "function_calling": "Answer with nothing but the function calls, in the form [name(parameter=value, ...)]. "
    "The functions of these examples are not available to you:",
    "classification": "Answer with nothing but the label:",
    "text": "Examples of good answers:",
}


def choose_shots(train: Sequence[Example], config: EvalConfig) -> tuple[Example, ...]:
    """The shortest golden training examples, taken from the categories in turn; deterministic.

    Fewer than `config.few_shot` are returned where the golden examples, or the room for them, run out.
    """
    golden = [example for example in train if _golden(example) is not None and len(example.messages) == 1]
    distinct = {_shown(example, config.task): example for example in reversed(golden)}  # upsampled ones count once
    by_category: dict[str, list[Example]] = {}
    for _, example in sorted(distinct.items(), key=lambda pair: (len(pair[0]), pair[0])):
        by_category.setdefault(example.category, []).append(example)
    queues = [by_category[name] for name in sorted(by_category)]
    chosen: list[Example] = []
    room = config.few_shot_chars
    while len(chosen) < config.few_shot and any(queues):
        for queue in queues:
            if queue and len(chosen) < config.few_shot:
                example = queue.pop(0)
                size = len(_shown(example, config.task))
                if size > room:
                    queue.clear()  # the rest of this category is longer still
                    continue
                room -= size
                chosen.append(example)
    return tuple(chosen)


def with_shots(messages: Sequence[Message], shots: Sequence[Example], task: str) -> tuple[Message, ...]:
    """The conversation with the examples in its system prompt, after what stands there already."""
    if not shots:
        return tuple(messages)
    own = [message.content for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    text = "\n\n".join([*own, INTRODUCTION[task], *(_shown(shot, task) for shot in shots)])
    return (Message("system", text), *rest)


def signature(tool: ToolSpec) -> str:
    """A tool as one line: `name(a: integer, b: string = optional)`."""
    properties: dict[str, Any] = dict(tool.parameters.get("properties") or {})
    required = set(tool.parameters.get("required") or ())
    shown = (
        f"{name}: {_type(schema)}" + ("" if name in required else " = optional") for name, schema in properties.items()
    )
    return f"{tool.name}({', '.join(shown)})"


def _golden(example: Example) -> Message | None:
    return next((target.message for target in example.targets if target.origin == "golden"), None)


def _shown(example: Example, task: str) -> str:
    message = _golden(example)
    assert message is not None
    answer = message.content
    if message.tool_calls:
        from stillroom.toolcalls import render_calls

        answer = render_calls(message.tool_calls)
    functions = f"Functions: {'; '.join(map(signature, example.tools))}\n" if example.tools else ""
    question = example.messages[-1].content
    return f"{functions}Question: {question}\nAnswer: {answer}"


def _type(schema: Any) -> str:
    kind = schema.get("type", "any") if isinstance(schema, dict) else "any"
    return " or ".join(map(str, kind)) if isinstance(kind, list | tuple) else str(kind)
