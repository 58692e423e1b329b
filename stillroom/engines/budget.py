"""What may still be spent. Reserved before a call, settled after it, remembered by the cache.

Promise: calls under way together never promise more than the budget, by the estimates; what was
really spent is booked in the answer cache, so a run that is resumed continues with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillroom.engines.config import BudgetConfig, Price
from stillroom.errors import BudgetExceeded
from stillroom.schema import Completion, GenerateParams, Message, ToolSpec, canonical_json, to_dict

BYTES_PER_TOKEN = 3.0  # English text is about 4, JSON about 3: rather too many tokens than too few
TOKENS_PER_MESSAGE = 8


class Budget:
    """Tokens and US dollars for one account.

    Args:
        max_tokens: prompt and answer tokens together; None: no bound.
        max_usd: US dollars; None: no bound.
        account: whose spending is counted. Runs that share cache and account share the budget; the default
            is the model's identity, so the budget bounds all that this cache ever paid this model.
    """

    def __init__(self, max_tokens: int | None = None, max_usd: float | None = None, *, account: str = "") -> None:
        self.config = BudgetConfig(max_tokens=max_tokens, max_usd=max_usd)
        self.account = account
        self.tokens, self.usd = 0, 0.0
        self._held_tokens, self._held_usd = 0, 0.0
        self._ratio = 1.0  # the largest seen of counted to estimated prompt tokens

    def start(self, spent: tuple[int, float]) -> None:
        """Begin with what was spent before, as the cache has it."""
        self.tokens, self.usd = spent

    def estimate(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec], params: GenerateParams, price: Price
    ) -> tuple[int, float]:
        """The most a call should take, as (tokens, US dollars): the prompt by its length, the answer at its cap."""
        prompt = int(self._plain_estimate(messages, tools) * self._ratio) + 1
        return prompt + params.max_tokens, price.usd(prompt, params.max_tokens)

    def reserve(self, tokens: int, usd: float) -> bool:
        """Hold an estimate; False when it would pass the budget together with what is spent and held."""
        limit = self.config
        if limit.max_tokens is not None and self.tokens + self._held_tokens + tokens > limit.max_tokens:
            return False
        if limit.max_usd is not None and self.usd + self._held_usd + usd > limit.max_usd:
            return False
        self._held_tokens += tokens
        self._held_usd += usd
        return True

    def release(self, tokens: int, usd: float) -> None:
        """Let go of a reservation whose call cost nothing."""
        self._held_tokens -= tokens
        self._held_usd -= usd

    def settle(self, tokens: int, usd: float, *, really_tokens: int, really_usd: float) -> None:
        """Replace a reservation by what the call took."""
        self.release(tokens, usd)
        self.tokens += really_tokens
        self.usd += really_usd

    def learn(self, messages: Sequence[Message], tools: Sequence[ToolSpec], answer: Completion) -> None:
        """Correct later estimates by a counted prompt, so that one kind of text is underestimated once at most."""
        self._ratio = max(self._ratio, answer.input_tokens / max(1, self._plain_estimate(messages, tools)))

    def exceeded(self, left: int) -> BudgetExceeded:
        """The error that says where the money went and what to do."""
        limit = self.config
        bounds = [
            *([f"max_tokens {limit.max_tokens:,}"] if limit.max_tokens is not None else []),
            *([f"max_usd {limit.max_usd:g}"] if limit.max_usd is not None else []),
        ]
        return BudgetExceeded(
            f"the next of {left} open requests could pass the budget ({', '.join(bounds)}); "
            f"spent so far: {self.tokens:,} tokens, {self.usd:.4f} USD. Every answer that was paid for is stored.\n"
            "help: raise the budget and run the same command again: only what is missing is asked."
        )

    def _plain_estimate(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> float:
        text = sum(len(canonical_json(to_dict(item)).encode("utf-8", "replace")) for item in (*messages, *tools))
        return text / BYTES_PER_TOKEN + TOKENS_PER_MESSAGE * len(messages)
