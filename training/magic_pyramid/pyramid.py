"""The model in training: a classifier, thresholds after its layers' attention, and exits after its layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.training.losses import divergence
from trimtab.training.lte.routers import Routing
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
        exits: number of layers → the exit behind so many; there is one behind each layer but the last, and one in front
            of the first if `settings.entrance`.
        layers: number of layers.
        stage: see `enter`.
        routing: routers that were learned before, at work in all stages; None where there are none.
        teacher: a model whose answers the soft and the hard stage learn from.
    """

    def __init__(self, model: PreTrainedModel, settings: Settings, mean_tokens: float) -> None:
        super().__init__()
        self.model, self.settings, layers = model, settings, layers_of(model)
        self.pruning = Pruning(
            len(layers), mean_tokens, settings.start, settings.sharpness, on_output=settings.mask == "output"
        )
        self.layers = len(layers)
        width, classes = int(model.config.hidden_size), int(model.config.num_labels or 0)
        self.exits = nn.ModuleDict(
            {
                str(number): make_exit(settings.head if number else "light", width, settings.head_width, classes)
                for number in range(0 if settings.entrance else 1, len(layers))
            }
        )
        self._had_thresholds = False
        self.stage, self._states = "fine_tune", list[tuple[Tensor, Tensor]]()
        self.routing: Routing | None = None
        self._teacher: list[Pyramid] = []  # in a list: it is no part of what is saved
        attach(model, [layer.attention for layer in layers], self.pruning)
        for layer in layers:
            layer.module.register_forward_pre_hook(self._before_layer, with_kwargs=True)
            layer.module.register_forward_hook(self._behind_layer)
        self._inputs = set(inspect.signature(model.forward).parameters)

    @property
    def prunes(self) -> bool:
        """Whether the model has thresholds at the end of the run."""
        return self.settings.makes_thresholds or self._had_thresholds

    def go_on(self, learned: Mapping[str, np.ndarray]) -> None:
        """Start from the tensors of an earlier run that have the same form.

        Args:
            learned: tensors in the format of `learned_tensors`.
        """
        thresholds = learned.get("thresholds")
        if thresholds is not None and len(thresholds) == self.layers:
            self.pruning.set_thresholds(torch.from_numpy(thresholds))
            self._had_thresholds = True
        for number, leave in self.exits.items():
            own = {name: torch.from_numpy(learned[f"exit.{number}.{name}"]) for name in leave.state_dict()
                   if f"exit.{number}.{name}" in learned}  # fmt: skip
            if {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in leave.state_dict().items()}:
                leave.load_state_dict(own)

    def teach(self, teacher: Pyramid) -> None:
        """Learn in the soft and the hard stage from the dense answers of `teacher`, too."""
        teacher.enter("fine_tune", pruned=False)
        if teacher.routing is not None:
            teacher.routing.mode = "dense"
        self._teacher = [teacher.eval().requires_grad_(False)]

    def enter(self, stage: str, *, pruned: bool) -> None:
        """Begin a stage.

        Args:
            stage: one of `STAGES`; it decides what learns.
            pruned: thresholds are learned before this stage, or in it.
        """
        self.stage = stage
        self.pruning.mode = _MODES.get(stage, "hard" if pruned else "dense")
        self.model.requires_grad_(stage != "exits")
        self.pruning.requires_grad_(stage == "soft")
        self.exits.requires_grad_(self.exits_learn)

    @property
    def exits_learn(self) -> bool:
        """Whether exits learn in this stage, alone or together with the model."""
        return self.stage == "exits" or (self.stage in ("soft", "hard") and self.settings.learns_jointly)

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
        exits = self._leave()
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

    def _leave(self) -> list[Tensor]:
        """Logits of each exit [batch, classes], from the first to the last."""
        return [leave(*self._states[int(number)]) for number, leave in self.exits.items()]

    def _before_layer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        states, *others = args
        self._states.append((states, self.pruning.stay))
        return (self.pruning.shrink(states), *others), kwargs

    def _behind_layer(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.pruning.weigh(output)

    def _loss(self, logits: Tensor, labels: Tensor, given: dict[str, Tensor]) -> Tensor:
        if self.stage == "fine_tune":
            return functional.cross_entropy(logits.float(), labels)
        exits = self._leave() if self.exits_learn else []
        masks, reached = self.pruning.masks, self.pruning.reached
        dense = None
        if self._teacher:
            with torch.no_grad():
                dense = self._teacher[0]._run(given)
        loss = self._distance(logits, labels, dense)
        if exits:
            of_exits = torch.stack([self._distance(each, labels, dense) for each in exits])
            loss = loss + self.settings.joint * of_exits.mean()
        if self.stage == "soft":
            share, left = (torch.stack([m.sum() for m in each]).mean() / given["attention_mask"].sum()
                           for each in (masks, reached))  # fmt: skip
            loss = loss + self.settings.pressure * share * (left > self.settings.keep)
        return loss

    def _distance(self, logits: Tensor, labels: Tensor, dense: Tensor | None) -> Tensor:
        """From the labels, and from the answers of the dense model."""
        loss = functional.cross_entropy(logits.float(), labels)
        if dense is None:
            return loss
        weight = self.settings.distil
        return (1 - weight) * loss + weight * divergence(logits, dense, 1.0).mean()

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of this stage for an optimizer: only matrices decay, and thresholds have their own rate."""
        settings = self.settings
        parameter_groups: list[dict[str, Any]] = []
        if self.stage != "exits":
            parameter_groups += _decaying(self.model, settings.lr, settings.weight_decay)
        if self.exits_learn:
            parameter_groups += _decaying(self.exits, settings.exit_lr, settings.weight_decay)
        if self.stage == "soft":
            parameter_groups.append(
                {"params": [self.pruning.multiples], "lr": settings.threshold_lr, "weight_decay": 0.0}
            )
        return parameter_groups


def _decaying(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of `module`; only matrices decay."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": lr, "weight_decay": 0.0},
    ]
