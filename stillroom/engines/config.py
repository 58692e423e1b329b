"""How a model is reached and what its answers cost. One shape for every engine; nothing here loads one."""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

EngineName = Literal["transformers", "llama.cpp", "openai", "bedrock", "recorded"]
ToolFormat = Literal["auto", "native", "python"]
Feature = Literal["grammar", "strict_tools", "json_schema", "seed", "max_completion_tokens"]

# What each engine cannot do without; `open_model` relies on it.
_NEEDS: dict[str, tuple[str, ...]] = {
    "transformers": ("path",),
    "llama.cpp": ("path",),
    "openai": ("url", "model"),
    "bedrock": ("model",),
    "recorded": ("path",),
}
# For Transformers: all at once, so that they are sorted and no row of the batch stays empty.
DEFAULT_CONCURRENCY = {"transformers": 1024, "llama.cpp": 1, "openai": 8, "bedrock": 8, "recorded": 64}


class Price(BaseModel, frozen=True, extra="forbid"):
    """What a million tokens cost, in US dollars. 0, where nobody pays by the token, is shown as no price."""

    input_per_million: float = Field(default=0.0, ge=0)
    """US dollars for a million tokens of prompt."""

    output_per_million: float = Field(default=0.0, ge=0)
    """US dollars for a million tokens of answer."""

    @property
    def stated(self) -> bool:
        """Whether a figure is given; zero, the default, says that nobody stated one."""
        return bool(self.input_per_million or self.output_per_million)

    def usd(self, input_tokens: float, output_tokens: float) -> float:
        """What so many tokens cost, in US dollars."""
        return (input_tokens * self.input_per_million + output_tokens * self.output_per_million) / 1e6


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """One model behind one engine: where it is, how tools are shown to it, under what terms it answers."""

    engine: EngineName
    """What runs or reaches the model."""

    name: str | None = None
    """The name shown in reports and written into targets; by default the model's own."""

    path: str | None = None
    """Transformers: a directory, hub id or GGUF. llama.cpp: a GGUF. recorded: a file or folder of invocation logs."""

    url: str | None = None
    """openai: the base URL, such as `http://localhost:8000/v1`. bedrock: an endpoint other than AWS's own."""

    model: str | None = None
    """The model's id at the endpoint."""

    chat_template: str | None = None
    """A chat template in place of the model's own: one that we ship (`chatml-tools`), or a `.jinja` file."""

    tool_format: ToolFormat = "auto"
    """How tools are shown: `native`, by the model's chat template or the endpoint's `tools`; `python`, in a system
    prompt of ours that asks for `[f(a=1)]`; `auto`, native where the chat template or the endpoint knows tools."""

    license: str = ""
    """The licence of the model's weights or service (SPDX id, or its name)."""

    terms: str = ""
    """What the terms say about its answers, in a sentence or a link; a clause against training refuses the run."""

    price: Price = Price()
    """What its tokens cost."""

    api_key_env: str | None = None
    """openai: the environment variable that holds the key. The key itself never stands in a config."""

    headers: dict[str, str] = {}
    """openai: further request headers; `$NAME` in a value is taken from the environment."""

    extra_body: dict[str, Any] = {}
    """openai, bedrock: further members of the request body (`additionalModelRequestFields` for bedrock)."""

    supports: tuple[Feature, ...] = ("seed",)
    """openai: what the server honours beyond the plain API. `grammar`: a GBNF in the request (llama.cpp's server);
    `strict_tools`: strict function schemas with `tool_choice: required`; `json_schema`: a `response_format`.
    Constrained requests need one of these three, taken in this order. `max_completion_tokens`: the newer name."""

    concurrency: int | None = Field(default=None, ge=1)
    """Requests under way at once; by default what suits the engine."""

    timeout_s: float = Field(default=120.0, gt=0)
    """Seconds that one answer may take at an endpoint."""

    max_response_bytes: int = Field(default=8 * 2**20, gt=0)
    """An endpoint's answer longer than this is refused unread."""

    context: int = Field(default=4096, ge=128)
    """llama.cpp: tokens of prompt and answer that fit."""

    threads: int | None = Field(default=None, ge=1)
    """llama.cpp: processor threads; by default the cores this process may use."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """transformers: arithmetic; `auto` is bfloat16 where the hardware computes in it, else float32."""

    device: str = "auto"
    """transformers: `cpu`, `cuda`, or `auto`."""

    max_batch: int = Field(default=64, ge=1)
    """transformers: answers written side by side at most."""

    batch_tokens: int = Field(default=32_768, ge=1)
    """transformers: tokens of prompts and answers held side by side at most; for SmolLM2-135M in float32 each
    takes 46 kB, so the default bounds them by 1.5 GB."""

    region: str | None = None
    """bedrock: the AWS region; by default what the AWS environment says."""

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        for needed in _NEEDS[self.engine]:
            if not getattr(self, needed):
                raise ValueError(f"engine {self.engine!r} needs `{needed}`; add `{needed}: ...` beside `engine`")
        return self


class RetryConfig(BaseModel, frozen=True, extra="forbid"):
    """How often and when a request that may work later is tried again."""

    attempts: int = Field(default=6, ge=1)
    """Tries for one request, the first included."""

    base_s: float = Field(default=0.5, ge=0)
    """The first pause in seconds; each further one doubles, with jitter of half of it."""

    max_s: float = Field(default=60.0, ge=0)
    """The longest pause of our own choosing; a server's Retry-After may ask for more, up to `max_retry_after_s`."""

    max_retry_after_s: float = Field(default=600.0, ge=0)
    """A server that asks for a longer pause than this has refused."""

    give_up_after: int = Field(default=20, ge=1)
    """So many failed requests in a row, none answered between them, stop the run."""

    def pause_s(self, attempt: int, asked_s: float | None) -> float | None:
        """Seconds to wait after failed attempt `attempt` (from 1), given what the server asked for.

        None when the server asks for more patience than `max_retry_after_s`.
        """
        if asked_s is not None:
            return asked_s if asked_s <= self.max_retry_after_s else None
        longest = min(self.max_s, self.base_s * 2 ** (attempt - 1))
        return random.uniform(longest / 2, longest)


class BudgetConfig(BaseModel, frozen=True, extra="forbid"):
    """What may be spent on one model's answers."""

    max_tokens: int | None = Field(default=None, ge=0)
    """Tokens of prompts and answers together; None: no bound."""

    max_usd: float | None = Field(default=None, ge=0)
    """US dollars at the model's `price`; None: no bound."""
