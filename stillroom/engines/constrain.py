"""Token masks from a grammar, for engines that hold the logits (llguidance, MIT)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from stillroom.errors import ModelError, ModelRefused
from stillroom.schema import ToolSpec


class CallGrammars:
    """Makes a `Matcher` for each request of one model.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        vocabulary: width of the logits, which may exceed the tokenizer's own.
        end_ids: the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(end_ids))
        self._lock = threading.Lock()

    def matcher(self, tools: Sequence[ToolSpec]) -> Matcher:
        """A matcher of the valid calls of `tools`, as Python text.

        Raises:
            ModelRefused: the tools' schemas cannot be compiled.
        """
        from stillroom.toolcalls import grammar

        with self._lock:
            matcher = llguidance.LLMatcher(self._tokenizer, llguidance.grammar_from("gbnf", grammar(tools, "python")))
        if matcher.is_error():
            raise ModelRefused(f"the tools' schemas cannot be compiled to a grammar: {matcher.get_error()}.")
        return Matcher(matcher)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, logits_V: Tensor) -> None:
        """Set the logits of tokens that may not come next to minus infinity, in place."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: logits_V.shape[0]].astype(bool)
        logits_V[: len(allowed)].masked_fill_(torch.from_numpy(~allowed).to(logits_V.device), float("-inf"))
        logits_V[len(allowed) :] = float("-inf")

    def take(self, token: int) -> bool:
        """Go on by one token; True when the answer is complete and nothing may follow."""
        if not self._matcher.consume_token(token):
            raise ModelError(f"the grammar does not go on with token {token}: {self._matcher.get_error()}.")
        return bool(self._matcher.is_stopped())
