"""What is trained is what changes, and nothing else."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from stillroom.errors import ConfigError
from stillroom.models import load
from stillroom.models.spectrum import layer_matrices, scan, strongest
from stillroom.training import LoraSettings, SpectrumSettings, TrainConfig, train
from stillroom.training.config import layers_in
from stillroom.training.selection import prepare
from tests.models.test_packed import LLAMA_SHAPE, tiny
from tests.training.test_train import examples, open_student

QUICK = TrainConfig(epochs=1, tokens_per_step=600, row_tokens=300, learning_rate=1e-2)


@pytest.fixture(scope="module", params=["tied", "untied"])
def student(request, tiny_student, tmp_path_factory):
    """The tiny student's tokenizer on a model of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = load(tiny_student)
    torch.manual_seed(1)
    config = LlamaConfig(
        **(LLAMA_SHAPE | {"num_hidden_layers": 4, "max_position_embeddings": 2048}),
        vocab_size=loaded.model.config.vocab_size, tie_word_embeddings=request.param == "tied",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    LlamaForCausalLM(config).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def changed(student, tmp_path, **settings) -> tuple[set[str], set[str]]:
    """Names of all parameters, and of those that training changed."""
    loaded = open_student(student)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    train(loaded, examples(6), QUICK.model_copy(update=settings), tmp_path)
    after = dict(loaded.model.named_parameters())
    assert after.keys() == before.keys()
    return set(before), {name for name in before if not torch.equal(before[name], after[name])}


def of_layers(names: set[str], layers: set[int]) -> set[str]:
    return {name for name in names if any(name.startswith(f"model.layers.{layer}.") for layer in layers)}


@pytest.mark.parametrize(("text", "layers"), [("1-2", {1, 2}), ("0,2-3", {0, 2, 3}), ("3", {3}), ("0-3", {0, 1, 2, 3})])
def test_only_the_named_layers_change_with_what_belongs_to_them(student, tmp_path, text, layers):
    names, found = changed(student, tmp_path, train_layers=text)
    ends = ({"model.embed_tokens.weight"} if 0 in layers else set()) | (
        {"model.norm.weight", "lm_head.weight"} & names if 3 in layers else set()
    )
    assert found == of_layers(names, layers) | ends


def test_freezing_lower_layers_is_training_the_upper_ones(student, tmp_path):
    frozen = changed(student, tmp_path / "a", freeze_layers=2)
    assert frozen == changed(student, tmp_path / "b", train_layers="2-3")


def test_spectrum_changes_the_best_of_each_kind_with_embedding_and_head(student, tmp_path):
    loaded = open_student(student)
    best = {score.name for score in strongest(list(scan(layer_matrices(loaded.model))), 30)}
    assert len(best) == 2 * 7  # 30% of four, rounded up, of seven kinds
    names, found = changed(student, tmp_path, spectrum=SpectrumSettings(top=30))
    assert found == best | {"model.embed_tokens.weight"} | ({"lm_head.weight"} & names)


def test_biases_go_with_their_matrix():
    model = tiny("qwen2")
    scores = list(scan(layer_matrices(model)))
    prepare(model, TrainConfig(spectrum=SpectrumSettings(top=1)), scores)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    chosen = {score.name for score in strongest(scores, 1)}
    biases = {
        name.replace(".weight", ".bias") for name in chosen if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    }
    assert trained >= chosen | biases
    assert trained - chosen - biases <= {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("base", ["fp32", "int8", "nf4"])
def test_adapters_change_their_layers_alone_and_packing_is_near(student, tmp_path, base):
    loaded = open_student(student)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    lora = LoraSettings(r=2, targets=("q_proj", "down_proj"), base=base)
    train(
        loaded, examples(6), QUICK.model_copy(update={"method": "lora", "lora": lora, "train_layers": "1-2"}), tmp_path
    )
    after = dict(loaded.model.named_parameters())
    assert after.keys() == before.keys()
    for name, was in before.items():
        adapted = bool(of_layers({name}, {1, 2})) and name.split(".")[-2] in ("q_proj", "down_proj")
        packed = base != "fp32" and "_proj" in name
        if not packed:
            assert torch.equal(after[name], was) != adapted, name
        elif not adapted:
            assert not torch.equal(after[name], was)
            assert (after[name] - was).norm() < {"int8": 0.02, "nf4": 0.15}[base] * was.norm()


def test_layers_that_are_not_there_and_ranges_that_are_none_are_refused(student, tmp_path):
    with pytest.raises(ConfigError, match=r"layer 4, but the student has 4, 0 to 3"):
        changed(student, tmp_path, train_layers="2-4")
    for text in ("", "a", "1-", "-3", "1;2", "1, 2"):
        with pytest.raises(ValidationError, match="train_layers"):
            TrainConfig(train_layers=text)
    assert layers_in("0-2,7") == {0, 1, 2, 7}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"freeze_layers": 1, "train_layers": "1"}, ("freeze_layers", "train_layers")),
        ({"freeze_layers": 1, "spectrum": SpectrumSettings()}, ("freeze_layers", "spectrum")),
        ({"train_layers": "1", "spectrum": SpectrumSettings()}, ("train_layers", "spectrum")),
        ({"method": "lora", "spectrum": SpectrumSettings()}, ("spectrum", "method: lora")),
        ({"lora": LoraSettings(base="nf4")}, ("lora.base: nf4", "method: lora")),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(settings, named):
    with pytest.raises(ValidationError) as refused:
        TrainConfig(**settings)
    assert all(name in str(refused.value) for name in named)
