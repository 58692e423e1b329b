"""A smaller vocabulary for a byte-pair tokenizer: which tokens stay, and a tokenizer that has only those.

Promise: text whose tokens all stay is encoded to the same tokens, by their new ids; any other text is encoded too,
in smaller pieces, and decodes to the same text as before. It rests on two facts: a token stays only together
with everything that it is merged from, and merges keep their order. At each step byte-pair encoding
applies the earliest merge that fits. Where that one stayed, it is still the earliest of those that fit; so by induction
every step of such a text is what it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import ModelError

SENTENCE_PIECE = {"▁", *(f"<0x{byte:02X}>" for byte in range(256))}
"""How SentencePiece writes a space, and the bytes of what it has no token for. A space written as the bytes of its
sign would not be turned back into a space."""


def keep_tokens(tokenizer: Any, needed: Iterable[int], at_least: int = 0) -> list[int]:
    """Ids to keep, ascending: `needed`, what those are merged from, every byte, special and added token.

    Args:
        tokenizer: a fast Transformers tokenizer of the byte-pair kind.
        needed: ids that must stay. at_least: tokens learnt first are added until there are so many.

    Raises:
        ModelError: the tokenizer is of another kind.
    """
    model = _bpe(tokenizer)["model"]
    vocabulary: dict[str, int] = model["vocab"]
    text_of = {index: token for token, index in vocabulary.items()}
    made_of: dict[str, list[tuple[str, str]]] = {}
    for left, right in _pairs(model["merges"]):
        made_of.setdefault(left + right, []).append((left, right))
    kept: set[str] = set()
    _keep(kept, {text_of[index] for index in needed if index in text_of}, made_of)
    _keep(kept, (_alphabet() | SENTENCE_PIECE | {model["unk_token"]}) & vocabulary.keys(), made_of)
    for token in made_of:  # in the order in which they were learnt
        if len(kept) >= at_least:
            break
        _keep(kept, {token}, made_of)
    return sorted({vocabulary[token] for token in kept} | set(tokenizer.added_tokens_decoder))


def trim_tokenizer(tokenizer: Any, tokens: list[int]) -> Any:
    """A tokenizer with `tokens` (from `keep_tokens`) alone, renumbered from 0 in their order.

    Template, named special tokens and the way of splitting are those of `tokenizer`, which stays as it was.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text, place = _bpe(tokenizer), {old: new for new, old in enumerate(tokens)}
    model = text["model"]
    model["vocab"] = {token: place[index] for token, index in model["vocab"].items() if index in place}
    model["merges"] = [
        [left, right] for left, right in _pairs(model["merges"]) if {left, right, left + right} <= model["vocab"].keys()
    ]
    for added in text["added_tokens"]:
        added["id"] = place[added["id"]]
    _renumber_template(text["post_processor"], place)
    extra = list(getattr(tokenizer, "extra_special_tokens", None) or ())
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(text)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        **({"extra_special_tokens": extra} if extra else {}),
        **{name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
    )


def token_map(trimmed: Any, whole: Any) -> Tensor | None:
    """For each token id of `trimmed` the id of the same token in `whole`, int64 [V]; None where it has others.

    The tokens' own texts are the map, so it cannot go stale: it is as right for a student read from a file.
    """
    theirs, found = whole.get_vocab(), trimmed.get_vocab()
    ordered = sorted(found, key=found.__getitem__)
    if [found[token] for token in ordered] != list(range(len(ordered))) or not found.keys() <= theirs.keys():
        return None
    return torch.tensor([theirs[token] for token in ordered], dtype=torch.int64)


def _bpe(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as its tokenizer.json would have it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "slow"}}
    if text["model"]["type"] != "BPE":
        raise ModelError(
            f"a vocabulary of the kind {text['model']['type']} cannot be trimmed here; byte-pair ones (BPE) can.\n"
            "help: use `vocabulary: all`."
        )
    return text


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have them as one text."""
    pairs = []
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def _alphabet() -> set[str]:
    """The 256 characters that stand for bytes in byte-level vocabularies."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _keep(kept: set[str], tokens: set[str], made_of: dict[str, list[tuple[str, str]]]) -> None:
    """Add tokens, and what they are merged from, whichever way."""
    waiting = list(tokens)
    while waiting:
        token = waiting.pop()
        if token not in kept:
            kept.add(token)
            waiting.extend(part for pair in made_of.get(token, ()) for part in pair)


def _renumber_template(processor: dict[str, Any] | None, place: dict[int, int]) -> None:
    """Ids in a post-processor, which writes special tokens around a text."""
    if processor is None:
        return
    for inner in processor.get("processors", ()):
        _renumber_template(inner, place)
    for special in processor.get("special_tokens", {}).values():
        special["ids"] = [place[token] for token in special["ids"]]
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = place[processor[name][1]]
