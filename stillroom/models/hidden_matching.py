"""Matching hidden states: the student's layers learn to say what layers of the teacher say, through a projector.

The projector exists while training does and is never exported: it only turns the student's width into the
teacher's. Source: the layers and losses of DistillKit; the map spreads over the teacher's depth, so that a
shallow student is not matched with the teacher's lowest layers alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stillroom.models.losses import TokenLoss


def layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """For each of the student's layers the teacher's that it is matched with, from 0; the last with the last.

    Raises:
        ValueError: a model has no layer.
    """
    if min(student_layers, teacher_layers) < 1:
        raise ValueError(f"{student_layers} and {teacher_layers} layers cannot be matched")
    return [max(0, round((layer + 1) * teacher_layers / student_layers) - 1) for layer in range(student_layers)]


class Projector(nn.Module):
    """One linear map a matched layer, from the student's width to the teacher's; trained with the student.

    It begins as the identity on the widths that both have, so that equal models start equal.
    """

    def __init__(self, layers: int, student_width: int, teacher_width: int) -> None:
        super().__init__()
        maps = [nn.Linear(student_width, teacher_width, bias=False) for _ in range(layers)]
        for linear in maps:
            nn.init.eye_(linear.weight)
        self.maps = nn.ModuleList(maps)


def match_hidden(
    student_SD: Tensor,
    teacher_SE: Tensor,
    projection: nn.Module,
    *,
    kind: Literal["mse", "cosine"] = "mse",
    scale: float = 1.0,
) -> TokenLoss:
    """`scale` times the sum over rows of the distance of one matched layer, and its gradient in `student_SD`.

    `mse` is the mean squared difference over the teacher's width, divided by the teacher's mean square of the row,
    so that layers of different sizes weigh alike; `cosine` is 1 minus the cosine.

    Args:
        student_SD, teacher_SE: the layer's hidden states of the same rows; fp32, the teacher's of any float format.
        projection: from D to E; its gradients are added to its parameters.

    Raises:
        ValueError: the rows disagree.
    """
    if len(student_SD) != len(teacher_SE):
        raise ValueError(f"the student has {len(student_SD)} rows, the teacher {len(teacher_SE)}")
    leaf_SD, teacher_SE = student_SD.detach().requires_grad_(True), teacher_SE.detach().float()
    with torch.enable_grad():
        projected_SE = projection(leaf_SD)
        if kind == "cosine":
            distance_S = 1 - torch.cosine_similarity(projected_SE, teacher_SE, -1)
        else:
            size_S = teacher_SE.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
            distance_S = (projected_SE - teacher_SE).square().mean(-1) / size_S
        loss = distance_S.double().sum() * scale
    loss.backward()
    return TokenLoss(loss.detach(), leaf_SD.grad)
