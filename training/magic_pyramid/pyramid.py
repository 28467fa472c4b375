"""The model that learns: a classifier, thresholds behind its layers' attention, and exits behind its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.training.losses import divergence
from trimtab.training.magic_pyramid.encoder import layers_of
from trimtab.training.magic_pyramid.exits import make_exit
from trimtab.training.magic_pyramid.pruning import Mode, Pruning, attach
from trimtab.training.magic_pyramid.settings import Settings

_MODES: dict[str, Mode] = {"fine_tune": "dense", "soft": "soft", "hard": "hard"}


class Pyramid(nn.Module):
    """A classifier of texts in one of the stages of training.

    Args:
        model: the classifier; its attention is replaced.
        settings: of the training.
        mean_tokens: of a text to learn from.

    Attributes:
        pruning: the thresholds.
        exits: one behind each layer but the last.
        stage: see `enter`.
        teacher: a model whose answers the soft and the hard stage learn from.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings, mean_tokens: float) -> None:
        super().__init__()
        self.model, self.settings, layers = model, settings, layers_of(model)
        self.pruning = Pruning(
            len(layers), mean_tokens, settings.start, settings.sharpness, on_output=settings.mask == "output"
        )
        width, classes = int(model.config.hidden_size), int(model.config.num_labels or 0)
        self.exits = nn.ModuleList(
            make_exit(settings.head, width, settings.head_width, classes) for _ in range(len(layers) - 1)
        )
        self.stage, self._pruned, self._states = "fine_tune", False, list[Tensor]()
        self._teacher: list[Pyramid] = []  # in a list: it is no part of what is saved
        attach(model, [layer.attention for layer in layers], self.pruning)
        for layer in layers:
            layer.module.register_forward_hook(self._behind_layer)
        self._inputs = set(inspect.signature(model.forward).parameters)

    def teach(self, teacher: Pyramid) -> None:
        """Learn in the soft and the hard stage from the dense answers of `teacher`, too."""
        teacher.enter("fine_tune", pruned=False)
        self._teacher = [teacher.eval().requires_grad_(False)]

    def enter(self, stage: str, *, pruned: bool) -> None:
        """Begin a stage.

        Args:
            stage: one of `STAGES`; it decides what learns.
            pruned: thresholds are learned before this stage, or in it.
        """
        self.stage, self._pruned = stage, pruned
        self.pruning.mode = _MODES.get(stage, "hard" if pruned else "dense")
        self.model.requires_grad_(stage != "exits")
        self.pruning.requires_grad_(stage == "soft")
        self.exits.requires_grad_(stage == "exits")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pyramid:
        """As in torch, which moves modules by this; the teacher goes along."""
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def train(self, mode: bool = True) -> Pyramid:
        """As in torch; what is frozen computes as in an engine, without dropout."""
        super().train(mode)
        if self.stage == "exits":
            self.model.eval()
            self.pruning.eval()
        return self

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The stage's loss; at evaluation also what the compiled model would do.

        Args:
            input_ids, attention_mask, token_type_ids: [batch, tokens].
            labels: [batch], classes.

        Returns:
            loss: of the stage in training, else the cross-entropy of the final classifier; and at evaluation logits
            [batch, classes], exits [batch, layers - 1, classes], stay [batch, layers], how many tokens stay behind each
            layer, and tokens [batch], how many there are.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and "token_type_ids" in self._inputs:
            given["token_type_ids"] = token_type_ids
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage != "exits"):
            logits = self._run(given)
        if self.training and self.stage != "exits":
            return {"loss": self._loss(logits, labels, given)}
        exits = [
            leave(states, mask)
            for leave, states, mask in zip(self.exits, self._states[:-1], self.pruning.masks[:-1], strict=True)
        ]
        if self.training:
            return {"loss": torch.stack([divergence(each, logits.detach(), 1.0).mean() for each in exits]).sum()}
        stay = torch.stack([mask.sum(-1) for mask in self.pruning.masks], 1)
        loss = functional.cross_entropy(logits.float(), labels)
        tokens = attention_mask.sum(-1)
        return {"loss": loss, "logits": logits, "exits": torch.stack(exits, 1), "stay": stay, "tokens": tokens}

    def _run(self, given: dict[str, Tensor]) -> Tensor:
        self._states = []
        self.pruning.begin(given["attention_mask"])
        logits: Tensor = self.model(**given).logits
        return logits

    def _behind_layer(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = self.pruning.weigh(output)
        self._states.append(output)
        return output

    def _loss(self, logits: Tensor, labels: Tensor, given: dict[str, Tensor]) -> Tensor:
        loss = functional.cross_entropy(logits.float(), labels)
        if self.stage == "fine_tune":
            return loss
        if self._teacher:
            with torch.no_grad():
                dense = self._teacher[0]._run(given)
            weight = self.settings.distil
            loss = (1 - weight) * loss + weight * divergence(logits, dense, 1.0).mean()
        if self.stage == "soft":
            real = given["attention_mask"].sum()
            share, reached = (
                torch.stack([mask.sum() for mask in masks]).mean() / real
                for masks in (self.pruning.masks, self.pruning.reached)
            )
            loss = loss + self.settings.pressure * share * (reached > self.settings.keep)
        return loss

    def groups(self) -> list[dict[str, Any]]:
        """What learns in this stage, for an optimizer: matrices decay, thresholds have a rate of their own."""
        settings = self.settings
        leaving = self.stage == "exits"
        module, rate = (self.exits, settings.exit_lr) if leaving else (self.model, settings.lr)
        learning = list(module.parameters())
        found: list[dict[str, Any]] = [
            {"params": [p for p in learning if p.dim() > 1], "lr": rate, "weight_decay": settings.weight_decay},
            {"params": [p for p in learning if p.dim() <= 1], "lr": rate, "weight_decay": 0.0},
        ]
        if self.stage == "soft":
            found.append({"params": [self.pruning.multiples], "lr": settings.threshold_lr, "weight_decay": 0.0})
        return found
