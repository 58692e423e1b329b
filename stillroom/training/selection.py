"""What is trained: everything, some layers, the matrices with most signal, or adapters; the rest is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from stillroom.errors import ConfigError
from stillroom.models.quantised import quantise, unpack
from stillroom.models.spectrum import MatrixScore, strongest
from stillroom.training.config import TrainConfig, layers_in

ALIGNMENT_BYTES = 64
"""Weights are moved to such addresses if need be: the last bit of a matrix product in MKL depends on alignment."""


def prepare(model: Any, config: TrainConfig, scores: Sequence[MatrixScore] = ()) -> Any:
    """Freeze what stays, put adapters in where asked; what is trained requires a gradient, nothing else does.

    Args:
        scores: of the model's matrices, where `config.spectrum` chooses by them.

    Raises:
        ConfigError: `config` names a layer that the model does not have.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % ALIGNMENT_BYTES:
            parameter.data = parameter.data.clone()
    layers = _layers(model, config)
    if config.method == "lora":
        return _adapt(model, config, layers)
    model.requires_grad_(config.spectrum is None)
    if config.spectrum:
        _train_strongest(model, strongest(scores, config.spectrum.top))
    elif layers is not None:
        _train_layers(model, layers)
    return model


def merged(model: Any) -> Any:
    """The trained model with plain weights: adapters are merged into what they were trained on, unpacked if need be."""
    if not hasattr(model, "peft_config"):
        return model
    unpack(model)
    return model.merge_and_unload()


def _layers(model: Any, config: TrainConfig) -> frozenset[int] | None:
    """Layers that are trained; None where no setting says which."""
    count = len(model.get_decoder().layers)
    if config.freeze_layers:
        return frozenset(range(config.freeze_layers, count))
    if config.train_layers is None:
        return None
    layers = layers_in(config.train_layers)
    if max(layers) >= count:
        raise ConfigError(
            f"training.train_layers={config.train_layers} names layer {max(layers)}, but the student has {count}, "
            f"0 to {count - 1}.\nhelp: after pruning, layers are numbered anew."
        )
    return layers


def _train_layers(model: Any, layers: frozenset[int]) -> None:
    """Freeze the other layers; the embedding goes with the lowest layer, norm and head with the highest."""
    decoder, last = model.get_decoder(), len(model.get_decoder().layers) - 1
    if layers and last not in layers:  # without any layer, norm and head are what `freeze_layers` leaves to train
        decoder.norm.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    decoder.embed_tokens.requires_grad_(0 in layers)
    for index, layer in enumerate(decoder.layers):
        if index not in layers:
            layer.requires_grad_(False)


def _train_strongest(model: Any, chosen: Sequence[MatrixScore]) -> None:
    """Thaw the chosen matrices with their biases, the embedding and the head."""
    for score in chosen:
        model.get_submodule(score.name.removesuffix(".weight")).requires_grad_(True)
    model.get_input_embeddings().requires_grad_(True)
    model.get_output_embeddings().requires_grad_(True)


def _adapt(model: Any, config: TrainConfig, layers: frozenset[int] | None) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = config.lora
    if settings.base != "fp32":
        quantise(model, settings.base)
    with warnings.catch_warnings():
        # peft 0.21 asks Transformers 5 for an attribute by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapters = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            layers_to_transform=None if layers is None else sorted(layers),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, adapters)
