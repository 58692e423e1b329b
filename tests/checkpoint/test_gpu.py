"""States on a GPU: copied on a stream beside training's, into memory that the driver knows."""

from __future__ import annotations

import pytest
import torch

from stillroom.checkpoint import CheckpointConfig, Checkpointer, pinned
from tests.checkpoint.states import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("stage", ["at once", "behind"])
def test_what_is_saved_is_what_the_gpu_held_when_save_was_called(tmp_path, stage):
    weight = torch.zeros(64 << 20, device="cuda")
    state = {"w": weight, "on the CPU": torch.ones(5), "step": 0}
    optimizer = torch.optim.SGD([torch.nn.Parameter(weight)], lr=1.0)
    with Checkpointer(tmp_path, config=CheckpointConfig(stage=stage, keep_latest=9)) as checkpointer:
        checkpointer.guard(optimizer)
        for step in range(1, 5):
            for _ in range(20):
                weight.add_(1)  # still under way when the copy is asked for
            save = checkpointer.save(step, state | {"step": step})
            optimizer.step()  # waits for the copy
            save.result()
            into: dict = {}
            checkpointer.load(into)
            assert into["w"].unique().tolist() == [20.0 * step]
            assert checkpointer.verify(step) == []


def test_the_arena_is_pinned_while_it_lives(tmp_path):
    state = {"w": torch.randn(1 << 20, device="cuda")}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state).result()
        assert list(pinned._PINNED.values()) == [True]
        into = {"w": torch.zeros_like(state["w"])}
        checkpointer.load(into)
        assert_same(into, state)
    assert not pinned._PINNED
