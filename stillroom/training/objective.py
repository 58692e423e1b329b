"""From the objective that a recipe names to the functions that compute it."""

from __future__ import annotations

from functools import partial

from stillroom.models import divergences
from stillroom.models.distilling import Blend
from stillroom.training.config import ObjectiveConfig


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


def _weights(config: ObjectiveConfig) -> dict[str, float]:
    if config.kind == "mix":
        return dict(config.weights)
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
