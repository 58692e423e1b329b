"""Many requests to one model: concurrent, cached, within a budget, and never twice for the same answer.

    cache -> (miss) reserve budget -> ask, backing off while the model is unavailable -> store -> settle

Promise: every answer is in the cache before it is counted; equal requests are asked once; when the
budget ends or the model is gone, what is under way is finished and stored before the error is raised.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stillroom import telemetry
from stillroom.engines.base import identity_of
from stillroom.engines.budget import Budget
from stillroom.engines.cache import AnswerCache, answer_key
from stillroom.engines.config import Price, RetryConfig
from stillroom.errors import ModelError, ModelUnavailable, NotRecorded
from stillroom.schema import ChatModel, Completion, GenerateParams, Message, ToolSpec, prompt_digest

T = TypeVar("T")
DEFAULT_PARAMS = GenerateParams()


@dataclass(frozen=True, slots=True)
class Request:
    """One question: a conversation, the tools, and how to answer."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    params: GenerateParams = DEFAULT_PARAMS


@dataclass(slots=True)
class AskStats:
    """What `ask` did, filled in as it runs: unique requests answered anew, from the cache, and failed."""

    answered: int = 0
    cached: int = 0
    failed: int = 0
    tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0


def ask(
    model: ChatModel,
    requests: Sequence[Request],
    *,
    cache: AnswerCache | None = None,
    concurrency: int | None = None,
    budget: Budget | None = None,
    retry: RetryConfig = RetryConfig(),
    label: str = "ask",
    stats: AskStats | None = None,
) -> list[Completion | ModelError]:
    """Answer all requests, in their order; what failed for good is the error that it failed with.

    Args:
        model: who answers.
        requests: equal ones are asked once.
        cache: where answers are looked up and stored; None keeps none.
        concurrency: requests under way at once; by default the model's own `concurrency`, or 8.
        budget: what may be spent; counted in the cache's account of the model.
        retry: when to try again, and when to give up altogether.
        label: what the progress line is called.
        stats: filled in as answers come, also when an error is raised.

    Raises:
        BudgetExceeded: the next call could pass the budget. Answers under way were awaited and stored.
        ModelUnavailable, ModelRefused, ModelError: `retry.give_up_after` requests failed in a row.
    """
    return run_async(
        ask_async(
            model, requests, cache=cache, concurrency=concurrency, budget=budget, retry=retry, label=label, stats=stats
        )
    )


async def ask_async(
    model: ChatModel,
    requests: Sequence[Request],
    *,
    cache: AnswerCache | None = None,
    concurrency: int | None = None,
    budget: Budget | None = None,
    retry: RetryConfig = RetryConfig(),
    label: str = "ask",
    stats: AskStats | None = None,
) -> list[Completion | ModelError]:
    """`ask` for callers that run an event loop."""
    identity = identity_of(model)
    keys = [answer_key(identity, request.messages, request.tools, request.params) for request in requests]
    unique = dict(zip(keys, requests, strict=True))
    workers = int(concurrency or getattr(model, "concurrency", None) or 8)
    if budget is not None:
        budget.account = budget.account or identity
        if cache is not None:
            budget.start(cache.spent(budget.account))
    with telemetry.progress(label, len(unique), "answers") as bar:
        account = budget.account if budget is not None else identity
        run = _Run(model, unique, cache, budget, retry, bar, stats or AskStats(), account)
        await run.finish(min(workers, max(1, len(unique))))
    return [run.results[key] for key in keys]


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where the caller's thread already has an event loop (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    box: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            box.append(asyncio.run(work))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return box[0]


@dataclass
class _Run:
    """The state of one `ask`: what is open, what came, and whether to stop."""

    model: ChatModel
    open: dict[str, Request]
    cache: AnswerCache | None
    budget: Budget | None
    retry: RetryConfig
    bar: telemetry.Progress
    stats: AskStats
    account: str
    results: dict[str, Completion | ModelError] = field(default_factory=dict)
    stop: Exception | None = None
    failed_in_a_row: int = 0
    not_before: float = 0.0
    under_way: int = 0

    async def finish(self, workers: int) -> None:
        """Answer everything with so many workers; raises `stop` once all of them are done."""
        started = time.monotonic()
        self.price: Price = getattr(self.model, "price", None) or Price()
        self.settled = asyncio.Condition()
        todo = deque(key for key in self.open if not self._from_cache(key))
        tasks = [asyncio.ensure_future(self._work(todo)) for _ in range(workers)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            self.stats.seconds += time.monotonic() - started
        if self.stop is not None:
            raise self.stop

    async def _work(self, todo: deque[str]) -> None:
        while todo and self.stop is None:
            key = todo.popleft()
            if self._from_cache(key):  # another process may have stored it meanwhile
                continue
            held = await self._reserve(self.open[key], len(todo) + 1)
            if held is None:
                return
            self.under_way += 1
            try:
                await self._answer(key, self.open[key], held)
            finally:
                self.under_way -= 1
                async with self.settled:
                    self.settled.notify_all()

    def _from_cache(self, key: str) -> bool:
        found = self.cache.get(key) if self.cache is not None else None
        if found is None:
            return False
        self.results[key] = found
        self.stats.cached += 1
        self._show()
        return True

    async def _reserve(self, request: Request, left: int) -> tuple[int, float] | None:
        """Hold the budget for a call; None when it does not fit even after all calls under way are settled."""
        if self.budget is None:
            return 0, 0.0
        while self.stop is None:
            held = self.budget.estimate(request.messages, request.tools, request.params, self.price)
            if self.budget.reserve(*held):
                return held
            if not self.under_way:
                self.stop = self.budget.exceeded(left)
                break
            async with self.settled:
                await self.settled.wait()
        return None

    async def _answer(self, key: str, request: Request, held: tuple[int, float]) -> None:
        """Ask until there is an answer or a final error; store it, settle the budget, count it."""
        try:
            answer = await self._try(request)
        except ModelError as error:
            self._fail(key, error, held)
            return
        except BaseException:
            if self.budget is not None:
                self.budget.release(*held)
            raise
        if self.cache is not None:
            self.cache.put(key, answer, prompt=prompt_digest(request.messages, request.tools), account=self.account)
        self.results[key] = answer
        tokens = answer.input_tokens + answer.output_tokens
        if self.budget is not None:
            self.budget.settle(*held, really_tokens=tokens, really_usd=answer.cost_usd)
            self.budget.learn(request.messages, request.tools, answer)
        self.failed_in_a_row = 0
        self.stats.answered += 1
        self.stats.tokens += tokens
        self.stats.usd += answer.cost_usd
        self._show()

    async def _try(self, request: Request) -> Completion:
        for attempt in range(1, self.retry.attempts + 1):
            await self._wait_for_turn()
            try:
                return await self.model.generate(request.messages, request.tools, request.params)
            except ModelUnavailable as error:
                pause = self.retry.pause_s(attempt, error.retry_after_s)
                if attempt == self.retry.attempts or pause is None or self.stop is not None:
                    raise
                if error.retry_after_s is not None:
                    # The server's wish holds for every worker: asking from the others would only be refused too.
                    self.not_before = max(self.not_before, time.monotonic() + pause)
                else:
                    await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _wait_for_turn(self) -> None:
        while (wait := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait + random.uniform(0, min(0.1, wait)))  # not all at the same instant

    def _fail(self, key: str, error: ModelError, held: tuple[int, float]) -> None:
        self.results[key] = error
        self.stats.failed += 1
        if self.budget is not None:
            if type(error) is ModelError and self.cache is not None:
                # It answered, though nothing usable: that is paid for all the same, at most as estimated.
                self.cache.book(self.account, *held)
                self.budget.settle(*held, really_tokens=held[0], really_usd=held[1])
            else:
                self.budget.release(*held)
        if not isinstance(error, NotRecorded):
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= self.retry.give_up_after and self.stop is None:
            self.stop = self._gone(error)
        self._show()

    def _gone(self, error: ModelError) -> ModelError:
        text = (
            f"{self.model.name} failed {self.failed_in_a_row} requests in a row; "
            f"{self.stats.answered + self.stats.cached} answers are stored. The last error was: {error}\n"
            "help: repair the cause and run the same command again: only what is missing is asked."
        )
        gone = type(error)(text)
        gone.__cause__ = error
        return gone

    def _show(self) -> None:
        stats = self.stats
        spend = {"usd": round(stats.usd, 4)} if stats.usd else {}
        self.bar.advance(1, cached=stats.cached, failed=stats.failed, tokens=stats.tokens, **spend)
