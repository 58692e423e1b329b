"""Tool names on wires that allow letters, digits, `_` and `-` only: written safely, and read back as they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stillroom.schema import ToolSpec
from stillroom.toolcalls import safe_name

MAX_NAME = 64


class SafeNames:
    """Names for one request, distinct even where two tools would be written alike (`a.b` and `a_b`)."""

    def __init__(self, tools: Sequence[ToolSpec]) -> None:
        self._wire: dict[str, str] = {}
        self._own: dict[str, str] = {}
        for tool in tools:
            self._add(tool.name)

    def tools(self, tools: Sequence[ToolSpec]) -> list[ToolSpec]:
        """The tools under their safe names."""
        return [replace(tool, name=self._wire[tool.name]) for tool in tools]

    def wire(self, name: str) -> str:
        """The safe name of a tool, also of one that is called in the conversation but not offered."""
        return self._wire.get(name) or self._add(name)

    def own(self, name: str) -> str:
        """The name that the user gave; an unknown one is the model's invention and stays."""
        return self._own.get(name, name)

    def _add(self, name: str) -> str:
        base = (safe_name(name) or "tool")[:MAX_NAME]
        wire, number = base, 2
        while wire in self._own:
            suffix = f"_{number}"
            wire, number = base[: MAX_NAME - len(suffix)] + suffix, number + 1
        self._wire[name], self._own[wire] = wire, name
        return wire


class PlainNames(SafeNames):
    """Names as they are, for logs of our own, where the wire's rule does not hold."""

    def _add(self, name: str) -> str:
        self._wire[name] = self._own[name] = name
        return name
