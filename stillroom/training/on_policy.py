"""Batches that the student writes itself, for a teacher to judge: with probability lambda in place of those given.

    source = OnPolicy(config.on_policy, stepper.model, end_ids, seed, longest, run.replay)
    batch = source.batch(step, batch)       # the given sequences, new samples, or samples of earlier steps

The student samples with its KV cache on, at its present weights. What comes back are ordinary sequences whose
targets are the sampled tokens, so that a step is normalised by the tokens that are really scored in it.

Promise: a batch depends on the weights, the seed, the step and the replay buffer alone. Every draw starts anew from
the seed and the step, so the buffer, which is part of a checkpoint, is all the state there is, and a resumed run draws
what an undisturbed one would have drawn. Nothing is taken from PyTorch's global random state.

Sources: lambda, Agarwal et al., arXiv:2306.13649 (GKD), algorithm 1; replay, Ko et al., arXiv:2402.03898 (DistiLLM),
section 3.2; teacher-mixed sampling, Gu et al., arXiv:2306.08543 (MiniLLM), section 2.2.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stillroom.engines.decoding import Partner, write_answers
from stillroom.engines.jobs import Job
from stillroom.errors import ConfigError
from stillroom.models.packing import TokenSequence
from stillroom.training.config import OnPolicyConfig

ROWS = 64
"""Answers under way at once, at most."""

BATCH_TOKENS = 65536
"""Tokens of prompts and answers whose keys and values are in memory at once, at most."""

Replayed = tuple[list[int], int, str]
"""A sampled sequence as a checkpoint keeps it: token ids, first target, name."""


class OnPolicy:
    """Decides for each step who wrote its answers, and has the student write them.

    Args:
        config: how often, and how.
        model: the student in training; only read here.
        end_ids: tokens that end an answer.
        seed: of every draw.
        longest: tokens that a prompt with its answer may have.
        replay: the samples kept so far, oldest first; changed in place, saved and restored by the caller.
        teacher: a model with the student's token ids that `teacher_share` mixes in.

    Raises:
        ConfigError: `teacher_share` is set and there is no such model.
    """

    def __init__(
        self,
        config: OnPolicyConfig,
        model: Any,
        end_ids: frozenset[int],
        seed: int,
        longest: int,
        replay: list[Replayed],
        teacher: Any = None,
    ) -> None:
        if config.teacher_share and teacher is None:
            raise ConfigError(
                f"on_policy.teacher_share={config.teacher_share} samples with a teacher, which is not in memory.\n"
                "help: use a teacher whose weights are at hand, or set on_policy.teacher_share to 0."
            )
        self.config, self.model, self.end_ids = config, model, end_ids
        self.seed, self.longest, self.replay = seed, longest, replay
        self.partner = Partner(teacher, config.teacher_share) if config.teacher_share else None

    def batch(self, step: int, given: Sequence[TokenSequence]) -> tuple[list[TokenSequence], str]:
        """The sequences to train on in place of `given`, and whose they are: `given`, `sampled` or `replayed`."""
        draw = random.Random(f"{self.seed}/{step}/on-policy")
        if draw.random() >= self.config.probability:
            return list(given), "given"
        if len(self.replay) >= len(given) and draw.random() < self.config.replay_share:
            chosen = draw.sample(self.replay, len(given))
            return [TokenSequence(tuple(ids), first, name) for ids, first, name in chosen], "replayed"
        sampled = self._sample(given, draw)
        self.replay += [(list(sequence.ids), sequence.first_target, sequence.name) for sequence in sampled]
        del self.replay[: max(0, len(self.replay) - self.config.replay)]
        return sampled, "sampled"

    def _sample(self, given: Sequence[TokenSequence], draw: random.Random) -> list[TokenSequence]:
        share = max(1, self.config.step_tokens // len(given))
        jobs = [
            Job(
                list(sequence.ids[: sequence.first_target]),
                max_tokens=max(1, min(self.config.max_tokens, share, self.longest - sequence.first_target)),
                temperature=self.config.temperature,
                seed=draw.getrandbits(63),
                top_p=self.config.top_p,
            )
            for sequence in given
        ]
        was_training = self.model.training
        self.model.eval()
        write_answers(
            self.model, jobs, self.end_ids, lambda job: None,
            max_batch=ROWS, batch_tokens=BATCH_TOKENS, partner=self.partner,
        )  # fmt: skip
        self.model.train(was_training)
        return [replace(sequence, ids=(*job.prompt, *job.written)) for sequence, job in zip(given, jobs, strict=True)]
