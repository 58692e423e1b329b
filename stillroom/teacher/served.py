"""A teacher behind an OpenAI-compatible server: its top log-probabilities for given token ids, or with its answer.

    scoring            request                                       who has it
    prompt_logprobs    completions, one for a sequence               vLLM
    echo               completions with `echo`, one for a sequence   servers of the older completions API
    prefix             completions, one for every scored token       llama.cpp, and any other that takes token ids
    (answer)           chat completions with `logprobs`              OpenAI; gives words and their signal together

Temperature is 1 in every request that scores. Servers bound how many they give (OpenAI and vLLM: 20); k is what came
back for every position of a sequence. What the server names and the student cannot is left to the tail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stillroom.engines.asking import run_async
from stillroom.engines.config import ModelConfig, RetryConfig
from stillroom.engines.names import SafeNames
from stillroom.engines.openai import OpenAIModel
from stillroom.engines.openai_wire import read_answer, shown
from stillroom.errors import ModelError, ModelRefused, ModelUnavailable
from stillroom.models.packing import TokenSequence
from stillroom.models.prompts import encode_prompt, end_of_turn_id
from stillroom.schema import GenerateParams, Message, ToolSpec, digest
from stillroom.teacher.signal_cache import SignalIdentity
from stillroom.teacher.tokens import TokenTable, different, vocabulary_digest
from stillroom.teacher.top_k import LOWEST, SequenceTopK, ValueBytes
from stillroom.telemetry import note

Scoring = Literal["prompt_logprobs", "echo", "prefix"]
USUAL_MOST = 20
"""The most log-probabilities that OpenAI gives, and vLLM unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its signal: the sequence is the student's prompt, the answer's own tokens and the end of turn."""

    message: Message
    sequence: TokenSequence
    signal: SequenceTopK


class ServedTeacher:
    """See the module. It is a `TopKTeacher`, so `fill` and `CachedTeacher` take it.

    Args:
        config: the endpoint; `engine` is `openai`.
        tokenizer: the student's, which must be the teacher's too.
        scoring: what the server offers.
        retry: when a request is tried again.

    Raises:
        ModelError: see `OpenAIModel`.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Any, scoring: Scoring, *, retry: RetryConfig = RetryConfig()
    ) -> None:
        self.model = OpenAIModel(config)
        self.tokenizer, self.scoring, self.retry = tokenizer, scoring, retry
        self._tokens = TokenTable(tokenizer)
        self._most: int | None = None

    def identity(self, top_k: int, value_bytes: ValueBytes = 2) -> SignalIdentity:
        """What decides the signals of this teacher, for a `SignalCache`."""
        return SignalIdentity(
            teacher=self.model.identity,
            precision=self.scoring,
            tokenizer=vocabulary_digest(self.tokenizer),
            template=digest(self.tokenizer.chat_template),
            vocabulary=self._tokens.size,
            top_k=min(top_k, self._tokens.size),
            value_bytes=value_bytes,
        )

    def close(self) -> None:
        """Close the connection; calling it twice is fine."""
        self.model.close()

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def top_k(self, row: Sequence[TokenSequence], wanted: Sequence[TokenSequence], k: int) -> list[SequenceTopK]:
        """The most likely tokens at every target of `wanted`; each sequence is asked for by itself.

        Raises:
            ConfigError: the server's tokenizer is not the student's.
            ModelError: there is no answer, or none with log-probabilities.
        """

        async def every() -> list[SequenceTopK]:
            free = asyncio.Semaphore(self.model.concurrency)
            return list(await asyncio.gather(*(self._score(sequence, k, free) for sequence in wanted)))

        return run_async(every())

    async def answer(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        params: GenerateParams = GenerateParams(),
        *,
        k: int = USUAL_MOST,
    ) -> Answered:
        """The teacher's answer to a conversation, with what else it might have said at every token.

        Where the server leaves out the token that ends the turn, it counts as certain: the teacher did end there.

        Raises:
            ModelRefused: the answer holds calls that the server took out of the text, or was cut off.
            ConfigError, ModelError: as `top_k`.
        """
        names = SafeNames(tools)
        body = self.model.request_body(messages, tools, params, names)
        response = await self._ask("chat/completions", body, k, lambda most: {"logprobs": True, "top_logprobs": most})
        answer = read_answer(response, names)
        if answer.message.tool_calls or answer.finish_reason == "length":
            raise ModelRefused(
                f"{self.model.name} gave calls apart from their tokens, or was cut off, so there is no signal.\n"
                "help: use `tool_format: python`, and raise max_tokens."
            )
        entries = _content(response)
        ids = [self._tokens.id_of(entry) for entry in entries]
        if None in ids or not ids:
            raise different(f"it wrote {shown([entry.get('token') for entry in entries])}, which has no ids here")
        tops = [self._position(entry.get("top_logprobs") or ()) for entry in entries]
        end = end_of_turn_id(self.tokenizer)
        if ids[-1] != end:
            ids.append(end)
            tops.append(_certain(end, tops[-1]))
        prompt = encode_prompt(self.tokenizer, messages, tools)
        sequence = TokenSequence((*prompt, *(index for index in ids if index is not None)), len(prompt))
        return Answered(answer.message, sequence, _stacked(tops, k))

    async def _score(self, sequence: TokenSequence, k: int, free: asyncio.Semaphore) -> SequenceTopK:
        asked = {"prompt_logprobs": self._by_prompt, "echo": self._by_echo, "prefix": self._by_prefix}[self.scoring]
        try:
            tops = await asked(sequence, k, free)
            return _stacked([self._position(entries) for entries in tops], k)
        except ModelError as error:
            raise type(error)(f"no signal for sequence {sequence.name!r}: {error}") from error

    async def _by_prompt(self, sequence: TokenSequence, k: int, free: asyncio.Semaphore) -> list[list[Any]]:
        async with free:
            response = await self._complete(sequence.ids, k, lambda most: {"prompt_logprobs": most})
        given = _choice(response).get("prompt_logprobs") or response.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(sequence.ids):
            raise self._no_logprobs(response)
        positions = []
        for index, said in list(zip(sequence.ids, given, strict=True))[sequence.first_target :]:
            if not isinstance(said, Mapping) or str(index) not in said:
                raise different(f"it read other tokens than were sent: {shown(said)} for token {index}")
            positions.append(
                [{"id": int(name), "token": one.get("decoded_token"), **one} for name, one in said.items()]
            )
        return positions

    async def _by_echo(self, sequence: TokenSequence, k: int, free: asyncio.Semaphore) -> list[list[Any]]:
        async with free:
            response = await self._complete(sequence.ids, k, lambda most: {"echo": True, "logprobs": most})
        logprobs = _choice(response).get("logprobs")
        logprobs = logprobs if isinstance(logprobs, Mapping) else {}
        tops, texts = logprobs.get("top_logprobs"), logprobs.get("tokens")
        if (
            not isinstance(tops, list)
            or not isinstance(texts, list)
            or not len(texts) >= len(tops) >= len(sequence.ids)
        ):
            raise self._no_logprobs(response)
        for index, text in zip(sequence.ids, texts, strict=False):
            found = self._tokens.id_of({"token": text})
            if found is not None and found != index:
                raise different(f"it read {text!r} where token {index} was sent")
        return [_pairs(said) for said in tops[sequence.first_target : len(sequence.ids)]]

    async def _by_prefix(self, sequence: TokenSequence, k: int, free: asyncio.Semaphore) -> list[list[Any]]:
        positions: list[list[Any]] = []
        for stop in range(sequence.first_target, len(sequence.ids)):  # in turn: the server keeps what it has read
            async with free:
                response = await self._complete(sequence.ids[:stop], k, lambda most: {"logprobs": most})
            logprobs = _choice(response).get("logprobs")
            if not isinstance(logprobs, Mapping):
                raise self._no_logprobs(response)
            older = logprobs.get("top_logprobs")
            if older and not isinstance(older, list):
                raise ModelError(f"top_logprobs is no list: {shown(older)}")
            positions.append(_pairs(older[0]) if older else _content(response)[0].get("top_logprobs") or [])
        return positions

    async def _complete(self, ids: Sequence[int], k: int, further: Any) -> Any:
        body = {"model": self.model.config.model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0}
        return await self._ask("completions", body | self.model.config.extra_body, k, further)

    async def _ask(self, path: str, body: Mapping[str, Any], k: int, further: Any) -> Any:
        """Ask for k, or for the usual most where the server refuses more."""
        try:
            return await self._try(path, {**body, **further(min(k, self._most or k))})
        except ModelRefused as error:
            if self._most is not None or k <= USUAL_MOST or "logprobs" not in str(error):
                raise
            note(f"{self.model.name} gives fewer than {k} log-probabilities a token; going on with {USUAL_MOST}.")
            self._most = USUAL_MOST
            return await self._try(path, {**body, **further(USUAL_MOST)})

    async def _try(self, path: str, body: Mapping[str, Any]) -> Any:
        for attempt in range(1, self.retry.attempts + 1):
            try:
                return await self.model.request(path, body)
            except ModelUnavailable as error:
                pause = self.retry.pause_s(attempt, error.retry_after_s)
                if attempt == self.retry.attempts or pause is None:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _position(self, entries: Any) -> dict[int, float]:
        """Log-probabilities by id, most likely first; what has no id here is left out.

        Raises:
            ConfigError: most of the mass that the server named has no id here. ModelError: it is no list of tokens.
        """
        try:
            found = [(self._tokens.id_of(entry), float(entry["logprob"])) for entry in entries]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ModelError(f"{self.model.name} sent no log-probabilities but {shown(entries)}") from error
        known = sorted((value, index) for index, value in found if index is not None)
        named, mapped = np.exp([value for _, value in found]).sum(), np.exp([value for value, _ in known]).sum()
        if not known or mapped < named / 2:
            raise different(f"most of {shown([entry.get('token') for entry in entries])} is unknown here")
        return {index: min(value, 0.0) for value, index in reversed(known)}

    def _no_logprobs(self, response: Any) -> ModelError:
        return ModelRefused(
            f"{self.model.name} answered without the log-probabilities of the tokens sent: {shown(response)}\n"
            "help: choose the `scoring` that the server has; `prefix` needs the least of it."
        )


def _choice(response: Any) -> Mapping[str, Any]:
    choices = response.get("choices") if isinstance(response, Mapping) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ModelError(f"the answer is no completion (no choices[0]): {shown(response)}")
    return choices[0]


def _content(response: Any) -> list[Mapping[str, Any]]:
    """The tokens of an answer in the chat API's form, which llama.cpp uses for completions too."""
    logprobs = _choice(response).get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list) or not content or not all(isinstance(entry, Mapping) for entry in content):
        raise ModelRefused(
            f"the answer has no log-probabilities: {shown(response)}\nhelp: use a model and server that give them."
        )
    return content


def _pairs(said: Any) -> list[dict[str, Any]]:
    """The older API's `{text: logprob}` in the newer one's form."""
    if not isinstance(said, Mapping):
        raise ModelError(f"the log-probabilities of a token are no mapping: {shown(said)}")
    return [{"token": text, "logprob": value} for text, value in said.items()]


def _certain(index: int, like: Mapping[int, float]) -> dict[int, float]:
    """`index` for sure, beside as many others as `like` has."""
    others: Iterable[int] = [other for other in like if other != index][: len(like) - 1]
    return {index: 0.0, **dict.fromkeys(others, -LOWEST)}


def _stacked(tops: Sequence[Mapping[int, float]], k: int) -> SequenceTopK:
    """One array: so many columns as every position has."""
    columns = min(k, *(len(top) for top in tops))
    ids_NK = np.array([list(top)[:columns] for top in tops], np.int64)
    logprobs_NK = np.array([list(top.values())[:columns] for top in tops], np.float32)
    with np.errstate(divide="ignore"):
        tail_N = np.log(np.maximum(0, 1 - np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)))
    return SequenceTopK(ids_NK, logprobs_NK, tail_N.astype(np.float32))
