"""The model that learns: a language model or classifier whose FFNs have routers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.training.examples import Kind
from trimtab.training.linears import FFNModules
from trimtab.training.lora import LEARNS, RATE, Adapters
from trimtab.training.losses import divergence
from trimtab.training.lte.losses import efficiency, over_tokens, separability
from trimtab.training.lte.routers import Mode, Routing
from trimtab.training.lte.settings import Settings

_ROUTER_DECAY = 0.0  # standardised inputs need none, and it would pull scores to the threshold


class Routed(nn.Module):
    """A model in one of the stages of training.

    Args:
        model: its FFNs get hooks.
        ffns: of the model, their neurons in order of the groups.
        kind: kind of the model, which decides its loss.

    Attributes:
        routing: the routers.
        stage: see `enter`.
        eta: weight of efficiency in the loss of the soft stage.
        lambda_: weight of separability.
        density: share of the groups that the last forward pass in training chose, or would choose; None before it.
    """

    def __init__(self, model: PreTrainedModel, ffns: Sequence[FFNModules], settings: Settings, kind: Kind) -> None:
        super().__init__()
        self.model, self.settings, self.kind = model, settings, kind
        self.routing = Routing(ffns, settings.group, settings.select, settings.masks, settings.router)
        self.stage, self.eta, self.lambda_ = "fine_tune", settings.efficiency, 0.0
        self.density: float | None = None
        self._downs = {ffn.layer: ffn.down for ffn in ffns}
        self._adapters: Adapters | None = None
        self._teacher: list[Routed] = []  # in a list: it is no part of what is saved
        self._inputs = set(inspect.signature(model.forward).parameters)
        self.register_state_dict_post_hook(_part_tied)

    @property
    def has_slopes(self) -> bool:
        """Whether gradients by the FFNs' outputs are available. A run of `layerwise` alone does not compute them for a
        language model, which may be too large for a backward pass."""
        return self.kind == "classifier" or bool(self.settings.soft or self.settings.hard)

    def teach(self, teacher: Routed) -> None:
        """Learn in the soft and the hard stage from the dense answers of `teacher`, too."""
        teacher.enter("fine_tune")
        self._teacher = [teacher.eval().requires_grad_(False)]

    def adapt(self) -> None:
        """Train adapters instead of the weights until `merge`, if the settings have a LoRA rank."""
        if self.settings.lora_rank:
            torch.manual_seed(self.settings.seed)
            self._adapters = Adapters(self.model, self.settings.lora_rank)
            self.routing.mask({layer: self._adapters.around(down) for layer, down in self._downs.items()})

    def merge(self) -> None:
        """Merge the adapters into the weights."""
        if self._adapters is not None:
            self._adapters.merge()
            self._adapters = None
            self.routing.mask(self._downs)

    def enter(self, stage: str) -> None:
        """Begin a stage: one of `STAGES`; it decides what learns."""
        self.stage, self.density = stage, None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._adapters is None or LEARNS in name)
        self.routing.requires_grad_(stage == "soft")

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of this stage for an optimizer: only matrices decay, and routers have their own rate."""
        settings, parameters = self.settings, [p for p in self.model.parameters() if p.requires_grad]
        rate = settings.lr * (1.0 if self._adapters is None else RATE)
        learning = [
            {"params": [p for p in parameters if p.dim() > 1], "lr": rate, "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "lr": rate, "weight_decay": 0.0},
        ]
        if self.stage == "soft":
            for layer in self.routing.routers:
                router = self.routing.router(layer)
                rate = router.rate(settings.router_lr)
                learning.append({"params": list(router.parameters()), "lr": rate, "weight_decay": _ROUTER_DECAY})
        return learning

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Routed:
        """As in torch, which moves modules by this; the teacher goes along."""
        for teacher in self._teacher:
            teacher._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The stage's loss; at evaluation also what the compiled model would choose.

        Args:
            input_ids, attention_mask, token_type_ids: [batch, tokens].
            labels: [batch], classes; or [batch, tokens], the tokens of a language model.

        Returns:
            loss: of the stage in training, else that of the task; and at evaluation logits [batch, classes] of a
            classifier, chosen [batch, FFNs], how many groups each FFN computes for the sample's tokens, and tokens
            [batch], how many those are.
        """
        given = self._taken(
            {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        )
        mode: Mode = "dense" if self.stage == "fine_tune" else "hard"
        if self.training and self.stage == "soft":
            mode = "soft"
        loss, logits = self._run(given, labels, mode)
        if self.training:
            return {"loss": self._loss(loss, logits, labels, given)}
        answers = {"loss": loss} | ({"logits": logits} if self.kind == "classifier" else {})
        return answers | self._chosen(input_ids, attention_mask)

    def run(self, batch: Mapping[str, Tensor], mode: Mode) -> Tensor:
        """Logits of a forward pass in `mode`.

        Args:
            batch: arguments of `forward`.
        """
        return self._run(self._taken(batch), batch["labels"], mode)[1]

    def _taken(self, batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """What the model takes of a batch, apart from labels."""
        known = self._inputs - {"labels"}
        return {name: value for name, value in batch.items() if value is not None and name in known}

    def _run(self, given: dict[str, Tensor], labels: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
        """The task's loss, and logits, of a forward pass in `mode`."""
        self.routing.mode = mode
        self.routing.begin()
        if self.kind == "language model":
            answer = self.model(**given, labels=labels, use_cache=False)
            return answer.loss, answer.logits
        logits: Tensor = self.model(**given).logits
        return functional.cross_entropy(logits.float(), labels), logits

    def _loss(self, loss: Tensor, logits: Tensor, labels: Tensor, given: dict[str, Tensor]) -> Tensor:
        if self.stage == "fine_tune":
            return loss
        of_ffns, mask = list(self.routing.logits.values()), given.get("attention_mask")
        with torch.no_grad():
            self.density = float(over_tokens((self.routing.chosen(each).float().mean(-1) for each in of_ffns), mask))
        if self._teacher:
            with torch.no_grad():
                _, dense = self._teacher[0]._run(given, labels, "dense")
            weight = self.settings.distil
            loss = (1 - weight) * loss + weight * divergence(logits, dense, 1.0).mean()
        if self.stage == "soft":
            scores = [self.routing.scores(each) for each in of_ffns]
            loss = loss + self.eta * over_tokens(map(efficiency, scores), mask)
            if self.lambda_:
                loss = loss + self.lambda_ * over_tokens(map(separability, scores), mask)
        return loss

    def _chosen(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        counts = []
        for layer in self.routing.routers:
            logits, groups = self.routing.logits.get(layer), self.routing.router(layer).groups
            if logits is None:  # dense
                counts.append((real * groups).sum(-1))
            else:
                counts.append((self.routing.chosen(logits).sum(-1).reshape(real.shape) * real).sum(-1))
        return {"chosen": torch.stack(counts, -1), "tokens": real.sum(-1)}


def _part_tied(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Copy all but the first of tensors that share memory, such as tied embeddings: safetensors refuses them."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())
