"""What the engines share: identity, price, and how an answer is put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.engines.config import DEFAULT_CONCURRENCY, ModelConfig, Price
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, digest


class Engine:
    """A ChatModel with a price and an identity. Subclasses implement `generate` and call `_completion`.

    Attributes:
        name: what reports and targets call it.
        identity: 64 hex digits of everything that decides its answers (weights or endpoint, how tools are
            shown); answers are cached under it.
        price: what its tokens cost.
        concurrency: requests under way at once that suit it.
    """

    def __init__(self, config: ModelConfig, name: str, parts: dict[str, Any]) -> None:
        self.config = config
        self._name = config.name or name
        self.parts = {"engine": config.engine, "name": self._name, **parts}
        self.identity = digest(self.parts)
        self.price: Price = config.price
        self.concurrency = config.concurrency or DEFAULT_CONCURRENCY[config.engine]

    @property
    def name(self) -> str:
        return self._name

    async def generate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec] = (), params: GenerateParams = GenerateParams()
    ) -> Completion:
        """Answer one conversation (see `ChatModel`). Answers in a text dialect stay text in `content`."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up what the engine holds; calling it twice is fine."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _completion(
        self, message: Message, finish_reason: str, input_tokens: int, output_tokens: int, latency_s: float | None
    ) -> Completion:
        cost = self.price.usd(input_tokens, output_tokens)
        return Completion(message, self.name, finish_reason, input_tokens, output_tokens, latency_s, cost)


def identity_of(model: Any) -> str:
    """What identifies any ChatModel's answers: its `identity`, or its name where it has none."""
    return str(getattr(model, "identity", None) or digest({"name": model.name}))
