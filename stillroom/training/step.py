"""One optimizer step: rows packed, gradients summed, clipped, applied.

Promise: the result depends on the weights, the step's sequences and the learning rate alone (and on the
random state, where adapters have dropout). Equal inputs give equal bits on one machine with one number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.errors import StillroomError
from stillroom.models.distilling import distil
from stillroom.models.losses import TokenLoss, cross_entropy
from stillroom.models.packed import hidden_states
from stillroom.models.packing import TokenSequence, pack, split
from stillroom.models.precision import pick_precision
from stillroom.models.products import Products
from stillroom.models.signals import TeacherSignal, TeacherSource
from stillroom.models.spectrum import MatrixScore
from stillroom.training.config import TrainConfig
from stillroom.training.objective import blend_of, check_teacher
from stillroom.training.selection import prepare


@dataclass(frozen=True, slots=True)
class StepReport:
    """Mean loss of the scored tokens in nats, norm of the gradient before clipping, and what was trained on."""

    loss: float
    gradient_norm: float
    tokens: int
    scored_tokens: int


class Stepper:
    """A model with its optimizer, ready to take steps.

    Args:
        model: a Transformers causal language model; frozen and adapted here as `config` says.
        config: what is trained, and what is minimised.
        teacher: what the teacher says about a packed row, where `config.objective` compares with it.
        scores: of the model's matrices, where `config.spectrum` chooses by them.

    Raises:
        ConfigError: the objective needs a teacher and there is none, or the other way round; or the student samples
            answers that the teacher cannot judge.
    """

    def __init__(
        self,
        model: Any,
        config: TrainConfig,
        teacher: TeacherSource | None = None,
        scores: Sequence[MatrixScore] = (),
    ) -> None:
        check_teacher(config, teacher)
        self.model = prepare(model, config, scores)
        self.config = config
        self.device = next(self.model.parameters()).device
        self.precision = pick_precision(config.precision, self.device.type)
        self.products = Products(self.precision)
        self.teacher = teacher
        self.blend = blend_of(config.objective)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = _optimizer(self.trained, config)

    @property
    def head_VD(self) -> Tensor:
        head: Tensor = self.model.get_output_embeddings().weight
        return head

    def step(self, sequences: Sequence[TokenSequence], learning_rate: float) -> StepReport:
        """Train on `sequences`, each scored token weighing the same.

        Raises:
            StillroomError: the loss or the gradient is not finite; the weights are as they were.
        """
        self.model.train()
        scored = sum(sequence.targets for sequence in sequences)
        loss = 0.0
        for row in split(sequences, self.config.row_tokens):
            loss += self._row(row, 1 / scored)
        norm = self._clip()
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            names = ", ".join(sequence.name for sequence in sequences[:3])
            raise StillroomError(
                f"the loss ({loss}) or its gradient (norm {norm}) is not a finite number, on a step that begins with "
                f"examples {names}.\n"
                "help: lower training.learning_rate, or check that the student's weights are finite."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        # Kept and cleared rather than freed: fresh pages for every gradient cost more than writing zeros.
        self.optimizer.zero_grad(set_to_none=False)
        self.products.forget()
        return StepReport(loss, norm, sum(len(sequence.ids) for sequence in sequences), scored)

    @torch.no_grad()
    def evaluate(self, sequences: Sequence[TokenSequence]) -> float:
        """Mean cross-entropy of the scored tokens, in nats."""
        self.model.eval()
        total = 0.0
        for row in split(sequences, self.config.row_tokens):
            packed = pack(row).to(self.device)
            hidden_SD = hidden_states(self.model, packed, self.products)
            total += float(cross_entropy(hidden_SD, self.head_VD, packed.labels_S, self.products, gradient=False).loss)
        return total / sum(sequence.targets for sequence in sequences)

    def _row(self, sequences: Sequence[TokenSequence], scale: float) -> float:
        packed = pack(sequences).to(self.device)
        # Before the student's pass, so that the teacher's activations and the student's never lie side by side.
        signal = self.teacher.signal(packed, sequences) if self.teacher else None
        hidden_SD = hidden_states(self.model, packed, self.products)
        loss, gradient_SD = self._token_loss(hidden_SD.detach(), packed.labels_S, signal, scale)
        if hidden_SD.requires_grad:
            hidden_SD.backward(gradient_SD)
        return float(loss)

    def _token_loss(self, hidden_SD: Tensor, labels_S: Tensor, signal: TeacherSignal | None, scale: float) -> TokenLoss:
        if signal is None or self.blend is None:
            smoothing = self.config.label_smoothing
            return cross_entropy(
                hidden_SD, self.head_VD, labels_S, self.products, scale=scale, label_smoothing=smoothing
            )
        rows = self.config.objective.chunk_rows
        return distil(
            hidden_SD, self.head_VD, labels_S, signal, self.blend, self.products, scale=scale, chunk_rows=rows
        )

    def _clip(self) -> float:
        """Cut the gradient to the configured norm; its norm before."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm > self.config.clip_norm:
            torch._foreach_mul_(gradients, self.config.clip_norm / norm)
        return norm


def _optimizer(trained: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with its state made at once, so that a checkpoint has somewhere to be copied to."""
    groups = [
        {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )
    for parameter in trained.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
