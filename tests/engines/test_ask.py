"""Many requests: each answer asked for once, within the budget, and kept whatever happens."""

from __future__ import annotations

import asyncio
import time

import pytest

from stillroom.engines import AnswerCache, AskStats, Budget, Price, RetryConfig, ask, ask_async
from stillroom.errors import BudgetExceeded, ModelError, ModelRefused, ModelUnavailable, NotRecorded
from stillroom.schema import Completion, Message
from stillroom.testing import ScriptedModel
from tests.engines.questions import question, questions

QUICK = RetryConfig(base_s=0.001, max_s=0.002, give_up_after=5)


def echo(messages, tools):
    return f"answer to {messages[-1].content}"


class Recording(ScriptedModel):
    """Notes how many requests are under way at once."""

    most, now = 0, 0

    async def generate(self, *args, **kwargs):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.001)
        self.now -= 1
        return await super().generate(*args, **kwargs)


def texts(answers):
    return [answer.message.content if isinstance(answer, Completion) else answer for answer in answers]


def test_answers_come_in_the_order_of_the_requests(tmp_path):
    model = Recording(echo)
    asked = questions(40)
    answers = ask(model, asked, concurrency=7)
    assert texts(answers) == [f"answer to {request.messages[-1].content}" for request in asked]
    assert model.most == 7


def test_equal_requests_are_asked_once_and_stored_answers_never(tmp_path):
    model, stats = ScriptedModel(echo), AskStats()
    asked = questions(3) * 4
    with AnswerCache(tmp_path) as cache:
        first = ask(model, asked, cache=cache, stats=stats)
        second = ask(model, [*asked, question("new")], cache=cache, stats=stats)
    assert len(model.asked) == 4
    assert first == second[:-1]
    assert (stats.answered, stats.cached, stats.failed) == (4, 3, 0)


def test_a_model_of_another_identity_is_asked_itself(tmp_path):
    with AnswerCache(tmp_path) as cache:
        ask(ScriptedModel(echo, name="one"), questions(2), cache=cache)
        other = ScriptedModel(echo, name="two")
        ask(other, questions(2), cache=cache)
    assert len(other.asked) == 2


def test_a_request_is_tried_again_while_the_model_is_unavailable():
    model = ScriptedModel([ModelUnavailable("busy"), ModelUnavailable("busy", retry_after_s=0.01), "at last"])
    assert texts(ask(model, [question("?")], retry=QUICK)) == ["at last"]


def test_after_the_last_attempt_the_error_is_the_result():
    model = ScriptedModel([ModelUnavailable(f"busy {index}") for index in range(3)])
    (error,) = ask(model, [question("?")], retry=QUICK.model_copy(update={"attempts": 3}))
    assert isinstance(error, ModelUnavailable)
    assert "busy 2" in str(error)


def test_a_refusal_is_not_tried_again():
    model = ScriptedModel([ModelRefused("no"), "never"])
    (error,) = ask(model, [question("?")], retry=QUICK)
    assert isinstance(error, ModelRefused)
    assert len(model.asked) == 1


def test_a_longer_pause_than_allowed_is_not_waited_for():
    model = ScriptedModel([ModelUnavailable("tomorrow", retry_after_s=86_400), "never"])
    started = time.monotonic()
    (error,) = ask(model, [question("?")], retry=QUICK)
    assert isinstance(error, ModelUnavailable)
    assert time.monotonic() - started < 60
    assert len(model.asked) == 1


def test_the_servers_pause_holds_for_every_worker():
    moments: list[float] = []

    class Busy(ScriptedModel):
        async def generate(self, *args, **kwargs):
            moments.append(time.monotonic())
            return await super().generate(*args, **kwargs)

    model = Busy([ModelUnavailable("wait", retry_after_s=0.2), *(["fine"] * 6)])
    ask(model, questions(6), concurrency=1, retry=QUICK)
    assert moments[1] - moments[0] >= 0.2


def test_a_model_that_is_gone_stops_the_run_and_keeps_what_came(tmp_path):
    def answer(messages, tools):
        number = int(messages[-1].content.split()[-1].rstrip("?"))
        return "fine" if number < 10 else ModelRefused("401 wrong key")

    with AnswerCache(tmp_path) as cache:
        model = ScriptedModel(answer)
        with pytest.raises(ModelRefused, match=r"5 requests in a row.*401 wrong key") as caught:
            ask(model, questions(100), cache=cache, concurrency=1, retry=QUICK)
        assert "run the same command again" in str(caught.value)
        assert len(model.asked) == 15
        assert len(cache) == 10


def test_failures_between_answers_do_not_stop_the_run():
    def answer(messages, tools):
        number = int(messages[-1].content.split()[-1].rstrip("?"))
        return ModelRefused("too long") if number % 4 else "fine"

    answers = ask(ScriptedModel(answer), questions(40), concurrency=1, retry=QUICK)
    assert sum(isinstance(answer, ModelRefused) for answer in answers) == 30


def test_what_was_not_recorded_never_stops_a_run():
    model = ScriptedModel(lambda messages, tools: NotRecorded("not there"))
    assert len(ask(model, questions(30), retry=QUICK)) == 30


def priced(text="x", tokens=50, usd=0.1):
    return Completion(
        Message("assistant", text), "scripted", input_tokens=tokens // 2, output_tokens=tokens // 2, cost_usd=usd
    )


def test_the_token_budget_is_never_passed_and_resuming_counts_what_was_spent(tmp_path):
    asked = [question(f"q{index}", max_tokens=40) for index in range(100)]
    with AnswerCache(tmp_path) as cache:
        model = ScriptedModel(lambda messages, tools: priced())
        with pytest.raises(BudgetExceeded, match="max_tokens 1,000"):
            ask(model, asked, cache=cache, concurrency=8, budget=Budget(max_tokens=1000))
        first = len(model.asked)
        assert 10 <= first <= 20
        assert cache.spent(model.identity)[0] == first * 50 <= 1000
        with pytest.raises(BudgetExceeded):
            ask(model, asked, cache=cache, concurrency=8, budget=Budget(max_tokens=1000))
        assert len(model.asked) == first
        answers = ask(model, asked, cache=cache, concurrency=8, budget=Budget(max_tokens=100_000))
        assert len(model.asked) == 100
        assert all(isinstance(answer, Completion) for answer in answers)


def test_the_money_budget_holds_with_calls_side_by_side(tmp_path):
    class Priced(Recording):
        price = Price(input_per_million=1000, output_per_million=2000)

    model = Priced(lambda messages, tools: priced(usd=25 * 0.001 + 25 * 0.002))
    with AnswerCache(tmp_path) as cache, pytest.raises(BudgetExceeded, match=r"max_usd 1"):
        ask(model, [question(f"q{index}", max_tokens=40) for index in range(100)], cache=cache, concurrency=20,
            budget=Budget(max_usd=1.0))  # fmt: skip
    assert 0.8 <= AnswerCache(tmp_path).spent(model.identity)[1] <= 1.0


def test_an_unusable_answer_is_paid_for(tmp_path):
    model = ScriptedModel(lambda messages, tools: ModelError("<html>"))
    with AnswerCache(tmp_path) as cache:
        ask(model, questions(2), cache=cache, budget=Budget(max_tokens=10_000))
        assert cache.spent(model.identity)[0] > 0


def test_a_prompt_that_was_underestimated_corrects_the_next_estimate():
    model = ScriptedModel(lambda messages, tools: priced(tokens=2000))
    budget = Budget(max_tokens=5000)
    with pytest.raises(BudgetExceeded):
        ask(model, [question(f"q{index}", max_tokens=1) for index in range(50)], concurrency=1, budget=budget)
    assert budget.tokens <= 5000


def test_a_cancelled_run_keeps_what_was_stored_and_goes_on(tmp_path):
    class Slow(ScriptedModel):
        async def generate(self, *args, **kwargs):
            await asyncio.sleep(0.005)
            return await super().generate(*args, **kwargs)

    async def cancelled(model, cache):
        work = asyncio.ensure_future(ask_async(model, questions(50), cache=cache, concurrency=2))
        while len(cache) < 5:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    with AnswerCache(tmp_path) as cache:
        asyncio.run(cancelled(Slow(echo), cache))
        stored = len(cache)
        assert 5 <= stored < 50
        model = ScriptedModel(echo)
        ask(model, questions(50), cache=cache)
        assert len(model.asked) == 50 - stored


def test_an_event_loop_of_the_callers_own_is_no_obstacle():
    async def notebook():
        return ask(ScriptedModel(echo), [question("x")])

    assert texts(asyncio.run(notebook())) == ["answer to x"]


def test_a_bug_in_a_model_is_not_hidden():
    def broken(messages, tools):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(ScriptedModel(broken), questions(3))


def test_no_requests_no_answers():
    assert ask(ScriptedModel([]), []) == []
