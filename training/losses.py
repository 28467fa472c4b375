"""Distances between a student's outputs and its teacher's, for each row."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² KL(teacher ‖ student) of each row of logits [..., classes] (Hinton et al. 2015, section 2)."""
    log_p = functional.log_softmax(teacher.float() / temperature, -1)
    log_q = functional.log_softmax(student.float() / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def binary_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² Σ KL(teacher ‖ student) over the logits of each row [..., width]; each logit is a binary choice."""
    s, t = student.float() / temperature, teacher.float() / temperature
    p = t.sigmoid()
    apart = p * (functional.logsigmoid(t) - functional.logsigmoid(s))
    apart = apart + (1 - p) * (functional.logsigmoid(-t) - functional.logsigmoid(-s))
    return temperature**2 * apart.sum(-1)


def scaled_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each row of scores [..., width], relative to the mean square of the teacher's rows."""
    t = teacher.float()
    return (student.float() - t).square().sum(-1) / t.square().sum(-1).mean().clamp_min(1e-6)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s - t‖² / ‖t‖² of each row, so that neither deep layers nor tokens of large norm outweigh the others."""
    t = teacher.float()
    return (student.float() - t).square().sum(-1) / t.square().sum(-1).clamp_min(1e-6)
