"""From the objective that a recipe names to the functions that compute it, and the teacher that it needs."""

from __future__ import annotations

from functools import partial

from stillroom.errors import ConfigError
from stillroom.models import divergences
from stillroom.models.distilling import Blend
from stillroom.models.signals import TeacherSource
from stillroom.training.config import ObjectiveConfig, TrainConfig


def blend_of(config: ObjectiveConfig) -> Blend | None:
    """What `distil` is to minimise; None for `sequence`, which looks at no teacher."""
    if not config.needs_teacher:
        return None
    weights = _weights(config)
    labels = weights.pop("sequence", 0.0)
    functions = _functions(config)
    return Blend(
        tuple((weight, functions[name]) for name, weight in weights.items()),
        labels,
        config.temperature,
        config.temperature_squared,
        config.tail,
    )


def check_teacher(config: TrainConfig, teacher: TeacherSource | None) -> None:
    """Refuse a teacher that does not go with `config`.

    Raises:
        ConfigError: the objective needs a teacher and there is none, or the other way round; or the student samples
            answers, and the teacher knows those of its cache alone.
    """
    kind, needed = config.objective.kind, config.objective.needs_teacher
    if needed and teacher is None:
        raise ConfigError(
            f"training.objective.kind={kind} compares with a teacher's distribution, and there is no teacher signal.\n"
            "help: give a teacher in memory or a cache of its log-probabilities, or set objective.kind=sequence."
        )
    if teacher is not None and not needed:
        raise ConfigError(
            f"there is a teacher signal, and training.objective.kind={kind} does not look at it.\n"
            "help: set objective.kind to one that does, such as forward_kl, or leave the teacher out."
        )
    if teacher is not None and config.on_policy and teacher.model is None:
        raise ConfigError(
            f"training.on_policy has the student write answers that nobody knows yet, and {type(teacher).__name__} "
            "gives cached or served signals of answers that were known before.\n"
            "help: give a teacher in memory, or leave training.on_policy out."
        )


def _weights(config: ObjectiveConfig) -> dict[str, float]:
    if config.kind == "mix":
        return {str(name): weight for name, weight in config.weights.items()}
    if config.kind == "symmetric":
        return {"forward_kl": 1 - config.reverse_share, "reverse_kl": config.reverse_share}
    return {config.kind: 1.0}


def _functions(config: ObjectiveConfig) -> dict[str, divergences.Divergence]:
    return {
        "forward_kl": divergences.forward_kl,
        "reverse_kl": divergences.reverse_kl,
        "adaptive_kl": partial(divergences.adaptive_kl, mu=config.mu),
        "jsd": partial(divergences.generalised_jsd, beta=config.beta, normalised=config.beta_normalised),
        "skew_forward_kl": partial(divergences.skew_forward_kl, skew=config.skew),
        "skew_reverse_kl": partial(divergences.skew_reverse_kl, skew=config.skew),
        "total_variation": divergences.total_variation,
    }
