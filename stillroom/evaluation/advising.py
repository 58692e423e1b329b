"""Before any training: how far does the teacher lead, and is that worth closing?

SageMaker's advice, made a measurement: where the gap between teacher and baseline student is too small, or
prompting the student better closes it, distillation is money for nothing, and the run says so first.
"""

from __future__ import annotations

from pydantic import BaseModel

from stillroom.evaluation.comparing import Comparison, compare
from stillroom.evaluation.config import EvalConfig
from stillroom.evaluation.results import Result


class Advice(BaseModel, frozen=True, extra="forbid"):
    """Whether to go on, in one sentence and with its figures.

    Attributes:
        worth_it: distillation has a gap to close.
        headline: the advice in a sentence. details: what it rests on, a sentence each.
        plain, best: teacher against base, each prompted plainly, and each at its best.
        prompted: the plain teacher against the base at its best: what better prompting alone gives.
    """

    worth_it: bool
    headline: str
    details: tuple[str, ...]
    plain: Comparison
    best: Comparison | None = None
    prompted: Comparison | None = None


def advise(
    base: Result,
    teacher: Result,
    config: EvalConfig = EvalConfig(),
    *,
    base_best: Result | None = None,
    teacher_best: Result | None = None,
) -> Advice:
    """Judge the gap between teacher and base by size (`config.min_gap`) and significance.

    Raises:
        NotEnoughData: teacher and base share no item.
    """
    plain = compare(teacher, base, config)
    best = compare(teacher_best, base_best, config) if base_best and teacher_best else None
    prompted = compare(teacher, base_best, config) if base_best else None
    details = [_sentence("Prompted plainly", plain, config)]
    if best is not None:
        details.append(_sentence("Each at its best (few-shot, constrained calls)", best, config))
    if prompted is not None:
        details.append(_sentence("The plain teacher against the base at its best", prompted, config))
    objection = _objection(plain, prompted, best, config)
    headline = (
        objection
        or f"Distillation has a gap to close: the teacher leads the base by {plain.difference.value:.2f} on "
        f"{plain.difference.n} items."
    )
    return Advice(
        worth_it=not objection, headline=headline, details=tuple(details), plain=plain, best=best, prompted=prompted
    )


def _objection(plain: Comparison, prompted: Comparison | None, best: Comparison | None, config: EvalConfig) -> str:
    """Why not to distil; empty when nothing speaks against it."""
    lead, n = plain.difference.value, plain.difference.n
    if lead <= 0:
        return f"Distillation is not worth it: the teacher does not lead the base on {n} items ({lead:+.2f})."
    if not plain.significant:
        return (
            f"Distillation is not worth it on this evidence: the teacher's lead of {lead:.2f} on {n} items could be "
            f"chance (p = {plain.p_value:.2f}). Measure on more items, or take a better teacher."
        )
    if lead < config.min_gap:
        return (
            f"Distillation is not worth it: the teacher leads by only {lead:.2f}, less than the least gap of "
            f"{config.min_gap:.2f} that evaluation.min_gap asks for."
        )
    strongest = best or prompted
    if strongest and (strongest.difference.value < config.min_gap or not strongest.significant):
        return (
            f"Distillation may not be worth it: at its best (few-shot, constrained calls) the base comes within "
            f"{strongest.difference.value:.2f} of the teacher. Prompt it that way first, which costs nothing."
        )
    return ""


def _sentence(how: str, comparison: Comparison, config: EvalConfig) -> str:
    d, level = comparison.difference, f"{config.confidence:.0%}"
    return (
        f"{how}: {comparison.first_value:.2f} against {comparison.second_value:.2f}, a difference of {d.value:+.2f} "
        f"({level} interval {d.low:+.2f} to {d.high:+.2f}, {comparison.test} p {_p(comparison.p_value)}, n = {d.n})."
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
