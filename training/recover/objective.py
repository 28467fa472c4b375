"""What recovery minimises: how far the rewritten model is from its dense self, in its outputs and along the way."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
from torch import Tensor
from torch.nn import functional

from trimtab.compiler.task import Task
from trimtab.passes.anatomy import Anatomy, Block
from trimtab.passes.errors import ModelError
from trimtab.training.losses import binary_divergence, divergence, relative_error, scaled_error

_ALONG = {"Cast", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}


@dataclass(frozen=True)
class Objective:
    """The tensors, by name, in which student and teacher are compared.

    Attributes:
        logits: outputs that become probabilities or scores by `activation`, [..., width].
        vectors: other outputs, such as sentence embeddings or hidden states, [..., d].
        states: the blocks' outputs, [..., d_model], under names that both graphs have.
        temperature: τ of the softmax of both, in the comparison of logits.
        states_weight: of the mean over `states`, beside the outputs.
        labels_weight: of the distance of the first logits from the samples' labels, beside the outputs.
        activation: "softmax" where a row of logits makes one choice among classes; "sigmoid" where each makes one of
            its own; any other where they are scores as they are.
    """

    logits: tuple[str, ...]
    vectors: tuple[str, ...]
    states: tuple[str, ...]
    temperature: float = 1.0
    states_weight: float = 1.0
    labels_weight: float = 0.0
    activation: str = "softmax"

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.logits + self.vectors

    def loss(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """What a step lowers: `output_loss`, plus the weighted distance of states.

        Args:
            student, teacher: tensors by name.
            mask: [batch, tokens], 0 where there is padding; used where a tensor has one row per token.
            labels: [batch], the classes of the samples, -100 where one has none; or [batch, width], ones and zeros or
                scores, NaN where a sample has none; or None.
        """
        total = self.output_loss(student, teacher, mask, labels)
        if self.states:
            apart = [_mean(relative_error(student[n], teacher[n]), mask) for n in self.states]
            total = total + self.states_weight * torch.stack(apart).mean()
        return total

    def output_loss(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        mask: Tensor | None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Distance of outputs: KL divergence of logits; relative squared error and 1 - cosine of vectors.

        With `labels_weight`, plus the weighted distance of the student's first logits from the labels.
        """
        parts = [_mean(self._apart(student[n], teacher[n]), mask) for n in self.logits]
        for name in self.vectors:
            cosine = functional.cosine_similarity(student[name].float(), teacher[name].float(), dim=-1)
            parts.append(_mean(1 - cosine + relative_error(student[name], teacher[name]), mask))
        if self.labels_weight and labels is not None and _any_known(labels):
            parts.append(self.labels_weight * self._from_labels(student[self.logits[0]].float(), labels))
        return torch.stack(parts).sum()

    def _apart(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distance of each row of logits [..., width] from the teacher's."""
        if self.activation == "softmax":
            return divergence(student, teacher, self.temperature)
        if self.activation == "sigmoid":
            return binary_divergence(student, teacher, self.temperature)
        return scaled_error(student, teacher)

    def _from_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean distance of logits [batch, width] from the labels of those samples that have some."""
        if self.activation == "softmax":
            return functional.cross_entropy(logits, labels)
        known = ~labels.isnan().any(-1)
        if self.activation == "sigmoid":
            return functional.binary_cross_entropy_with_logits(logits[known], labels[known])
        return functional.mse_loss(logits[known], labels[known])

    def agreement(self, student: dict[str, Tensor], teacher: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        """Share of rows with the same highest class, or the mean cosine of vectors, of the first output.

        Of logits that are no classes: 1 - mean difference of probabilities, or of scores 1 - `scaled_error`.
        """
        a, b = student[self.outputs[0]].float(), teacher[self.outputs[0]].float()
        if self.logits and self.activation == "sigmoid":
            return _mean(1 - (a.sigmoid() - b.sigmoid()).abs().mean(-1), mask)
        if self.logits and self.activation != "softmax":
            return _mean(1 - scaled_error(a, b), mask)
        same = (a.argmax(-1) == b.argmax(-1)).float() if self.logits else functional.cosine_similarity(a, b, dim=-1)
        return _mean(same, mask)


def _any_known(labels: Tensor) -> bool:
    known = ~labels.isnan() if labels.is_floating_point() else labels >= 0
    return bool(known.any())


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over rows; over those of real tokens where there is one row per token, whether as [B, T] or [B·T]."""
    if mask is None or mask.numel() != rows.numel() or rows.dim() == 0:
        return rows.mean()
    weight = mask.reshape(rows.shape).to(rows.dtype)
    return (rows * weight).sum() / weight.sum()


def find_objective(
    dense: gs.Graph, student: gs.Graph, anatomy: Anatomy, task: Task | None = None, **weights: float
) -> Objective:
    """Where to compare: the outputs, and what each block hands on, wherever passes have left its name standing.

    Args:
        anatomy: of `dense`.
        task: of the model; None where its outputs have no known use. Of a model of embeddings, these alone are compared
            as outputs.
        weights: of Objective, by name.

    Raises:
        ModelError: the model has no output of floats that is [..., d].
    """
    floats = [t for t in dense.outputs if t.dtype is None or getattr(t.dtype, "kind", "f") == "f" or _is_float(t)]
    head = anatomy.head.linears[-1].y.name if anatomy.head is not None else None
    logits = tuple(t.name for t in floats if t.name in (head, "logits"))
    vectors = () if logits else tuple(t.name for t in floats if t.shape is None or len(t.shape) in (2, 3))
    if task is not None and task.kind == "embedding" and task.output in vectors:
        vectors = (task.output,)  # the states that it is pooled from count once, along the way
    if not logits + vectors:
        raise ModelError(
            "the model has no output to compare: neither logits nor vectors",
            hint="train a model with logits, or with states of tokens",
        )
    there = student.tensors()
    states = [_state(block, there) for block in anatomy.blocks if block.ffn is not None]
    activation = task.activation if task is not None and task.output in logits else "softmax"
    return Objective(
        logits, vectors, tuple(name for name in states if name is not None), activation=activation, **weights
    )


def _state(block: Block, there: dict[str, gs.Tensor]) -> str | None:
    """What `block` hands on: the stream behind it, or its norm where nothing else reads it (the last of the model).

    Of the two the last that is `there`; None where none is.
    """
    name, tensor = None, block.y
    while True:
        if isinstance(there.get(tensor.name), gs.Variable):
            name = tensor.name
        if len(tensor.outputs) != 1 or tensor.outputs[0].op not in _ALONG:
            return name
        tensor = tensor.outputs[0].outputs[0]


def _is_float(tensor: gs.Tensor) -> bool:
    return "float" in str(tensor.dtype)
