"""A student cut out of a larger model: fewer layers, fewer tokens, the same weights otherwise.

    student = prune(teacher, PruneConfig(layers=6, vocabulary="from-data"), sequences)
    judge = restrict(teacher, student.tokenizer)     # the teacher, reading and writing the student's token ids

Promise: the model that is cut stays as it was, and what is cut out shares no memory with it. Sequences that
the vocabulary was chosen from keep their tokens; only the ids are others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ConfigError, ModelError
from stillroom.models.config import PruneConfig
from stillroom.models.loading import Loaded
from stillroom.models.packed import LLAMA_LIKE
from stillroom.models.vocabulary import keep_tokens, token_map, trim_tokenizer
from stillroom.schema import digest

INFLUENCE_TOKENS = 512
"""Tokens of a sequence that are read to measure influence."""

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def prune(loaded: Loaded, config: PruneConfig, sequences: Sequence[Sequence[int]] = ()) -> Loaded:
    """A student made of `loaded`'s own layers and tokens.

    Args:
        loaded: a Llama-like model, which is left as it was.
        config: what stays.
        sequences: token ids of what the student will read and write, prompts and answers.

    Raises:
        ConfigError: `layers` is more than there are, or `sequences` are needed and there are none.
        ModelError: the architecture or the kind of tokenizer cannot be cut.
    """
    _check(loaded, config, sequences)
    count = loaded.model.config.num_hidden_layers
    layers = list(range(count))
    if config.layers is not None and config.choose == "influence":
        chosen = sequences[:: -(-len(sequences) // config.influence_sequences)]
        layers = most_influential(block_influence(loaded.model, chosen), config.layers)
    elif config.layers is not None:
        layers = spread_layers(count, config.layers)
    if config.vocabulary == "all":
        return _cut(loaded, layers, None)
    needed = {token for sequence in sequences for token in sequence} | _named_ids(loaded.model)
    return _cut(loaded, layers, keep_tokens(loaded.tokenizer, needed, config.min_vocabulary))


def restrict(teacher: Loaded, tokenizer: Any) -> Loaded:
    """`teacher` in the token ids of `tokenizer`, which was trimmed from its own; the other tokens lose their mass.

    Its layers are shared with `teacher`, not copied; embedding and head are cut. The distribution that comes out is
    the teacher's over the tokens that the student has, renormalised.

    Raises:
        ModelError: the tokenizer was not trimmed from the teacher's, or the architecture cannot be cut.
    """
    kept = token_map(tokenizer, teacher.tokenizer)
    if kept is None:
        raise ModelError(
            f"the student's tokenizer was not trimmed from that of {teacher.name}: it has other tokens.\n"
            "help: prune the student from this teacher, or use an objective for different tokenizers."
        )
    _check_architecture(teacher)
    state = {name: value[kept] if name in _BY_TOKEN else value for name, value in teacher.model.state_dict().items()}
    config = _config(teacher.model, range(teacher.model.config.num_hidden_layers), kept.tolist())
    with torch.device("meta"):
        model = type(teacher.model)(config).to(teacher.model.dtype)
    model.load_state_dict(state, strict=not config.tie_word_embeddings, assign=True)
    model.tie_weights()
    model.model.rotary_emb = teacher.model.model.rotary_emb  # its buffers are in no state
    model.requires_grad_(False).eval()
    return replace(
        teacher, model=model, tokenizer=tokenizer, digest=digest([teacher.digest, kept.tolist()]), source=None
    )


def spread_layers(count: int, keep: int) -> list[int]:
    """Which `keep` of `count` layers lie furthest apart: the first, the last and evenly spaced ones between.

    Source: Shleifer and Rush 2020, arXiv:2010.13002, section 3.2 (copy maximally spaced layers).
    """
    if keep == 1:
        return [0]
    return [round(index * (count - 1) / (keep - 1)) for index in range(keep)]


def most_influential(influence: Sequence[float], keep: int) -> list[int]:
    """The `keep` layers of greatest influence in their order; of equals the lower."""
    ranked = sorted(range(len(influence)), key=lambda layer: (-influence[layer], layer))
    return sorted(ranked[:keep])


@torch.no_grad()
def block_influence(model: Any, sequences: Sequence[Sequence[int]]) -> list[float]:
    """How much each layer changes its input: one minus the mean cosine between input and output over all tokens.

    Source: ShortGPT, arXiv:2403.03853, equation 1.
    """
    layers = model.get_decoder().layers
    cosines = torch.zeros(len(layers), dtype=torch.float64)

    def watch(index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            leaving = output[0] if isinstance(output, tuple) else output
            cosines[index] += torch.cosine_similarity(entering.float(), leaving.float(), dim=-1).double().sum().cpu()

        return layers[index].register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(index) for index in range(len(layers))]
    tokens = 0
    try:
        for sequence in sequences:
            ids = torch.tensor(sequence[:INFLUENCE_TOKENS], device=model.device)
            model.get_decoder()(input_ids=ids[None], use_cache=False)
            tokens += len(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return (1 - cosines / tokens).tolist()


def _check(loaded: Loaded, config: PruneConfig, sequences: Sequence[Sequence[int]]) -> None:
    _check_architecture(loaded)
    count = loaded.model.config.num_hidden_layers
    if config.layers is not None and config.layers > count:
        raise ConfigError(f"prune.layers={config.layers}, but {loaded.name} has {count} layers.")
    needs = config.choose == "influence" and config.layers is not None
    if not sequences and (needs or config.vocabulary == "from-data"):
        setting = "choose: influence" if needs else "vocabulary: from-data"
        raise ConfigError(f"prune with `{setting}` looks at data, and none was given.\nhelp: give it some examples.")


def _check_architecture(loaded: Loaded) -> None:
    kind = loaded.model.config.model_type
    if kind not in LLAMA_LIKE:
        known = ", ".join(sorted(LLAMA_LIKE))
        raise ModelError(f"{loaded.name} is of type {kind!r}, which cannot be pruned here; {known} can.")


def _cut(loaded: Loaded, layers: Sequence[int], tokens: list[int] | None) -> Loaded:
    tokenizer, source = loaded.tokenizer, loaded.source
    if tokens is not None:
        # A GGUF's own tokenizer no longer fits, so the source is not named any more.
        tokenizer, source = trim_tokenizer(loaded.tokenizer, tokens), None
    config = _config(loaded.model, layers, tokens)
    state = _cut_state(loaded.model.state_dict(), layers, tokens)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model = type(loaded.model).from_pretrained(None, config=config, state_dict=state, dtype=loaded.model.dtype)
    if model.generation_config is not None and loaded.model.generation_config is not None:
        model.generation_config = copy.deepcopy(loaded.model.generation_config)
        _renumber(model.generation_config, tokens)
    model.config.architectures = [type(model).__name__]
    kept = {"layers": list(layers), "tokens": tokens}
    return replace(
        loaded, model=model.to(loaded.model.device).eval(), tokenizer=tokenizer, source=source,
        digest=digest({"pruned": loaded.digest, **kept}),
    )  # fmt: skip


def _cut_state(state: dict[str, Tensor], layers: Sequence[int], tokens: list[int] | None) -> dict[str, Tensor]:
    """Copies of what stays, under its new names."""
    place = {old: new for new, old in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        found = _LAYER.fullmatch(name)
        if found and int(found[1]) not in place:
            continue
        new_name = f"model.layers.{place[int(found[1])]}.{found[2]}" if found else name
        kept[new_name] = value[tokens].clone() if tokens is not None and name in _BY_TOKEN else value.clone()
    return kept


def _config(model: Any, layers: Sequence[int], tokens: list[int] | None) -> Any:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [kinds[layer] for layer in layers]
    if tokens is not None:
        config.vocab_size = len(tokens)
        _renumber(config, tokens)
    return config


def _renumber(config: Any, tokens: list[int] | None) -> None:
    if tokens is None:
        return
    place = {old: new for new, old in enumerate(tokens)}
    for name in _TOKEN_IDS:
        value = getattr(config, name, None)
        if value is not None:
            setattr(config, name, [place[token] for token in value] if isinstance(value, list) else place[value])


def _named_ids(model: Any) -> set[int]:
    """Token ids that the model's settings name: ends, beginnings, padding."""
    found: set[int] = set()
    for settings in (model.config, model.generation_config):
        for name in _TOKEN_IDS:
            value = getattr(settings, name, None)
            found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return {token for token in found if 0 <= token < model.config.vocab_size}
