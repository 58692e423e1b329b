"""Latency is measured over enough unbatched calls, or not at all."""

from __future__ import annotations

import pytest

from stillroom.errors import ConfigError, NotEnoughData
from stillroom.evaluation import EvalConfig, Result, measure_speed, speed_of_answers

from .sample import CONFIG, items, model


def test_thirty_calls_one_after_the_other_after_the_warm_up_and_first_tokens_apart():
    test = items(4)
    scripted = model("m", test, 2)
    speed = measure_speed(scripted, test, CONFIG, max_tokens=8, in_process=True)
    assert len(scripted.asked) == CONFIG.warmup_calls + 30 + CONFIG.first_token_calls
    assert speed.calls == len(speed.latencies_s) == 30
    assert min(speed.latencies_s) <= speed.p50.low <= speed.p50.value <= speed.p50.high <= speed.p95_s
    assert speed.p95_s <= max(speed.latencies_s)
    assert speed.p99_s is None
    assert speed.first_token_calls == 2
    assert speed.memory_bytes > 1_000_000


def test_p99_needs_a_thousand_calls():
    config = EvalConfig(latency_calls=1000, first_token_calls=0)
    speed = measure_speed(model("m", items(2), 1), items(2), config, max_tokens=8)
    assert speed.p99_s is not None
    assert speed.first_token_s is None
    assert speed.memory_bytes is None


def test_too_few_calls_are_refused_and_none_are_fine():
    with pytest.raises(ConfigError, match="at least 30"):
        measure_speed(model("m", items(1), 1), items(1), EvalConfig(latency_calls=29), max_tokens=8)
    assert measure_speed(model("m", items(1), 1), items(1), EvalConfig(latency_calls=0), max_tokens=8) is None
    with pytest.raises(NotEnoughData):
        measure_speed(model("m", items(1), 1), [], max_tokens=8)


def test_an_endpoints_latency_is_that_of_the_answers_it_gave():
    items_of = [{"id": str(i), "latency_s": (i + 1) / 10, "output_tokens": 2} for i in range(31)]
    speed = speed_of_answers(Result(model="m", items=items_of))
    assert (speed.calls, speed.p50.value) == (31, pytest.approx(1.6))
    assert speed.output_tokens_per_s == pytest.approx(62 / sum(speed.latencies_s))
    assert speed_of_answers(Result(model="m", items=[*items_of[:29], {"id": "x"}])) is None
