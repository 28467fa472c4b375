"""The loop of a distillation: a teacher, a student, and a schedule that follows the clock.

The learning rate has come down to nothing when the time is over, however fast the machine.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import Tensor, nn

from trimtab.compiler.progress import Progress
from trimtab.passes.contract import Rounding
from trimtab.passes.errors import TrimtabError
from trimtab.training.clock import Clock, schedule
from trimtab.training.device import best_device, bfloat16_is_fast
from trimtab.training.recover.objective import Objective
from trimtab.training.recover.settings import Settings
from trimtab.training.samples import Batch, Feeds, Samples
from trimtab.training.torch_graph import GraphModule

log = logging.getLogger(__name__)


class Distillation:
    """A teacher, a student, and what the one learns from the other."""

    def __init__(
        self, dense: gs.Graph, student: gs.Graph, names: Sequence[str], objective: Objective, samples: Samples,
        settings: Settings, rounding: Rounding | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(settings.seed)
        self.settings, self.objective, self.samples = settings, objective, samples
        self.device = best_device()
        wanted = [*objective.outputs, *objective.states]
        self.teacher = GraphModule(dense, outputs=wanted).to(self.device)
        self.student = GraphModule(student, train=names, outputs=wanted, rounding=rounding).to(self.device)
        self._judged: list[tuple[Batch, dict[str, Tensor]]] = []

    def run(self, rng: np.random.Generator, start: float, progress: Progress | None) -> dict[str, Any]:
        """Train until time or steps are over, and leave the student with the weights that judged best.

        Args:
            start: reading of the monotonic clock from which the time counts.

        Returns:
            steps, losses and agreement with the teacher before and after, for the record.
        """
        settings = self.settings
        optimizer = torch.optim.AdamW(self._groups(), lr=settings.lr, betas=(0.9, 0.98), fused=True)
        batches = self.samples.epochs(settings.batch_size, rng)
        began = time.monotonic()
        before = best = self.judge()
        weights = self._weights()
        clock = Clock(settings.minutes, settings.steps, start, time.monotonic() - began)
        step, check_at, history = 0, clock.every, [best | {"step": 0}]
        while (at := clock.at(step)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * schedule(at)
            loss = self._loss(next(batches))
            _require_finite(loss.item(), step)
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            at = clock.at(step)
            if at >= min(check_at, 1):
                check_at = at + clock.every
                now = self.judge()
                _require_finite(now["loss"], step)
                history.append(now | {"step": step})
                log.info("step %d: loss %.4f, agreement %.4f on held-out samples", step, now["loss"], now["agreement"])
                if now["loss"] < best["loss"]:
                    best, weights = now, self._weights()
            if progress is not None:
                progress("distil", round(min(at, 1) * clock.total), clock.total)
        with torch.no_grad():
            for parameter, value in zip(self.student.parameters(), weights, strict=True):
                parameter.copy_(value)
        return {"steps": step, "before": before, "after": best, "history": history}

    def judge(self) -> dict[str, float]:
        """Loss of the outputs, and agreement with the teacher, on the samples held out."""
        objective = self.objective
        if not self._judged:  # the teacher's answers do not change, and its outputs are small
            for batch in self.samples.judged(self.settings.batch_size):
                out = self._infer(self.teacher, batch.feeds)
                self._judged.append((batch, {name: out[name] for name in objective.outputs}))
        sums, count = np.zeros(2), 0
        for batch, teacher in self._judged:
            student, mask = self._infer(self.student, batch.feeds), self._mask(batch.feeds)
            loss = objective.output_loss(student, teacher, mask, self._labels(batch))
            sums += len(batch) * np.array([float(loss), float(objective.agreement(student, teacher, mask))])
            count += len(batch)
        return {"loss": float(sums[0] / count), "agreement": float(sums[1] / count)}

    def _loss(self, batch: Batch) -> Tensor:
        teacher = self._infer(self.teacher, batch.feeds)
        with self._autocast():
            student = self.student(self._tensors(batch.feeds))
        return self.objective.loss(student, teacher, self._mask(batch.feeds), self._labels(batch))

    def _infer(self, module: GraphModule, feeds: Feeds) -> dict[str, Tensor]:
        with torch.no_grad(), self._autocast():
            return module(self._tensors(feeds))

    def _tensors(self, feeds: Feeds) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for name, value in feeds.items()}

    def _labels(self, batch: Batch) -> Tensor:
        return torch.from_numpy(batch.labels).to(self.device)

    def _mask(self, feeds: Mapping[str, np.ndarray]) -> Tensor | None:
        mask = feeds.get("attention_mask")
        return None if mask is None else torch.from_numpy(np.ascontiguousarray(mask)).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16_is_fast(self.device))

    def _groups(self) -> list[dict[str, Any]]:
        """Matrices decay; biases and norms do not."""
        parameters = list(self.student.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]

    def _weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.student.parameters()]


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrimtabError(f"recover: the loss is {loss} at step {step}", hint="use a smaller --lr")
