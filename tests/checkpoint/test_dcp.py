"""The drop-in: the calls of `torch.distributed.checkpoint`, swapped by an import."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint.metadata import Metadata

import stillroom.checkpoint.dcp as ours
from stillroom.errors import CheckpointError
from tests.checkpoint.states import assert_same


class Counter:
    """A `Stateful`, as TorchTitan's training state is."""

    def __init__(self, step: int) -> None:
        self.step, self.tokens = step, torch.tensor(step * 10)

    def state_dict(self):
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state):
        self.step, self.tokens = state["step"], state["tokens"]


def state(seed: int) -> dict:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    return {"model": model.state_dict(), "train": Counter(seed), "lr": 0.1 * seed}


@pytest.mark.parametrize("saver", [ours, stock], ids=["ours", "stock"])
@pytest.mark.parametrize("loader", [ours, stock], ids=["ours", "stock"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
def test_ours_and_torchs_calls_go_together(tmp_path, saver, loader, asynchronous):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if asynchronous and saver is stock:
            pytest.skip("takes a process group")
        if asynchronous:
            assert saver.async_save(state(1), checkpoint_id=str(tmp_path / "any name")).result() is None
        else:
            assert isinstance(saver.save(state(1), checkpoint_id=str(tmp_path / "any name")), Metadata)
        into = state(2)
        weight, train = into["model"]["weight"], into["train"]
        assert loader.load(into, checkpoint_id=str(tmp_path / "any name")) is None
    assert into["model"]["weight"] is weight
    assert into["train"] is train
    assert_same(into["model"], state(1)["model"])
    assert_same(train.state_dict(), state(1)["train"].state_dict())
    assert into["lr"] == 0.1


def test_alternating_states_and_directories(tmp_path):
    for step in range(3):
        ours.save({"model": torch.full((3,), float(step))}, checkpoint_id=tmp_path / f"model-{step}")
        ours.save({"optimizer": [torch.full((2, 2), float(step))]}, checkpoint_id=tmp_path / f"optimizer-{step}")
    into = {"model": torch.zeros(3)}
    ours.load(into, checkpoint_id=tmp_path / "model-1")
    assert into["model"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_stager_asks_for_both_futures(tmp_path):
    response = ours.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "x", async_stager=object())
    assert response.staging_completion.result() is None
    assert response.upload_completion.result() is None


def test_what_is_missing_or_refused_says_so(tmp_path):
    ours.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "x")
    into = {"w": torch.zeros(3), "other": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="'other'"):
        ours.load(into, checkpoint_id=tmp_path / "x")
    assert into["w"].tolist() == [0, 0, 0]
    for arguments in ({"planner": object()}, {"use_collectives": False}, {}):
        with pytest.raises(CheckpointError, match=r"not supported|checkpoint_id"):
            ours.save({"w": torch.ones(3)}, checkpoint_id=(tmp_path / "y") if arguments else None, **arguments)
    (tmp_path / "file").write_text("")
    failed = ours.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "file" / "x")
    assert "Not a directory" in str(failed.exception())


@pytest.mark.filterwarnings("ignore")
def test_a_storage_of_the_callers_own_is_torchs_affair(tmp_path):
    """As where TorchTitan exports to Hugging Face's format at the end."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    weights = {"w": torch.randn(3, 4), "b": torch.randn(5)}
    ours.save(weights, storage_writer=HuggingFaceStorageWriter(path=str(tmp_path)))
    [file] = tmp_path.glob("*.safetensors")
    assert_same(load_file(file), weights)
    into = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    ours.load(into, storage_reader=HuggingFaceStorageReader(path=str(tmp_path)))
    assert_same(into, weights)


def test_the_command_line_lists_verifies_and_exports(tmp_path):
    from safetensors.torch import load_file
    from typer.testing import CliRunner

    from stillroom.checkpoint import Checkpointer
    from stillroom.cli import app

    weights = {"a.w": torch.randn(3, 4).bfloat16(), "b": torch.randn(5)}
    root = tmp_path / "checkpoints"
    with Checkpointer(root) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"weights": weights, "run": {"step": step}}, metrics={"loss": 0.5}).result()

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout.splitlines()[-1])

    listed = run("ls", root)["checkpoints"]
    assert [(entry["step"], entry["metrics"]) for entry in listed] == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert run("verify", root) == {"root": str(root), "checked": [1, 2], "damaged": {}}
    run("export", root, tmp_path / "hf", "--prefix", "weights")
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), weights)
    run("export", root, tmp_path / "all.pt", "--format", "torch", "--step", 1)
    assert_same(torch.load(tmp_path / "all.pt"), {"weights": weights, "run": {"step": 1}})
    with (root / "step-00000002" / "__0_0.distcp").open("r+b") as file:
        file.seek(300)
        file.write(b"!!")
    assert list(run("verify", root, code=1)["damaged"]) == ["2"]


def test_shards_are_loaded_through_their_index(tmp_path):
    from safetensors.torch import load_file

    from stillroom.checkpoint import Checkpointer, exporting

    with Checkpointer(tmp_path) as checkpointer:
        path = checkpointer.save(1, {f"layer{n}": torch.full((100,), float(n)) for n in range(5)}).result().path
    assert exporting.export_safetensors(path, tmp_path / "out", shard_bytes=900)["files"] == 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "out" / file)[name].unique().tolist() == [float(name[5:])]
