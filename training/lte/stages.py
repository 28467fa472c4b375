"""The stages of one run: dense fine-tuning, fitting FFN by FFN, soft masks, hard masks."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EvalPrediction, TrainerControl, TrainerState, TrainingArguments

from trimtab.training.clock import Clock
from trimtab.training.huggingface import is_first_process, require_finite
from trimtab.training.linears import FFNModules
from trimtab.training.lte.control import Controller, trim
from trimtab.training.lte.judge import judge, row
from trimtab.training.lte.layerwise import LayerFit, densities
from trimtab.training.lte.record import Recorded, batches_of, real_tokens, record_inputs, standardise, to_device
from trimtab.training.lte.settings import STAGES
from trimtab.training.stages import FollowStage, Stages

METHOD = "lte"
_SOME = 2048  # tokens that set thresholds and standardise the routers' inputs
_SEPARATES = 0.4  # share of the soft stage from which separability grows: earlier it would freeze the choice of groups

log = logging.getLogger(__name__)


class LTEStages(Stages):
    """The stages of a `Routed`."""

    method = METHOD
    names = STAGES
    shown: ClassVar[Mapping[str, str]] = {
        "fine_tune": "fine-tune", "layerwise": "FFN by FFN", "soft": "soft mask", "hard": "hard mask",
    }  # fmt: skip

    ffns: Sequence[FFNModules] = ()
    """The FFNs of the model, set by the caller."""

    def enter(self, stage: str) -> None:
        self.model.enter("fine_tune" if stage == "before" else stage)

    def judge(self, prediction: EvalPrediction) -> dict[str, Any]:
        return judge(prediction, [ffn.d_ff // self.settings.group for ffn in self.ffns], self.model.kind)

    def row(self, stage: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        return row(stage, step, metrics)

    def behind(self, stage: str) -> None:
        """After `fine_tune`, the model becomes the teacher, and the inputs of its FFNs standardise the routers."""
        left = {"layerwise", "soft", "hard"} & (self.shares.keys() - self.done.keys())
        if stage != "fine_tune" or not left:
            return
        if not self.done.keys() & {"layerwise", "soft"}:
            standardise(self.model, record_inputs(self.model, self.ffns, self.examples, _SOME))
        if self.settings.distil and left & {"soft", "hard"}:
            self.model.teach(copy.deepcopy(self.model))

    def stage(self, stage: str, start: float) -> float:
        if stage == "layerwise":
            return self._layerwise(start)
        self.model.adapt()
        return super().stage(stage, start)

    @property
    def follower(self) -> type[FollowRouted]:
        return FollowRouted

    def trim(self) -> float:
        """Move the threshold so that the requested share of neurons is computed on some training texts.

        Returns:
            the share that is reached.
        """
        model, was = self.model, self.model.training
        model.eval()

        def forward() -> list[Tensor]:
            parts: dict[str, list[Tensor]] = {}
            for batch in batches_of(self.examples, _SOME, self.settings.batch_size):
                real = real_tokens(batch).to(next(model.parameters()).device)
                with torch.no_grad():
                    model.run(to_device(batch, model), "hard")
                for layer, logits in model.routing.logits.items():
                    flat = logits.reshape(-1, logits.shape[-1])
                    parts.setdefault(layer, []).append(flat[real] if len(flat) == len(real) else flat)
            return [torch.cat(each) for each in parts.values()]

        reached = trim(model.routing.cut, self.settings.select, 1 - self.settings.sparsity, forward)
        model.train(was)
        return reached

    def _layerwise(self, start: float) -> float:
        """Fit FFN by FFN. Each fitted FFN is saved, and a killed run resumes with the next one."""
        stage, scratch, seconds = "layerwise", self.scratch("layerwise"), time.monotonic()
        trainer, look = self.first_look(stage)
        files = scratch if is_first_process() else None  # two processes must not write the same ones
        inputs = record_inputs(
            self.model, self.ffns, self.examples, self.settings.layer_tokens, files, weighed=self.model.has_slopes
        )
        standardise(self.model, inputs)
        density = self._densities(inputs, scratch / "densities.json")
        ends = start + 60 * self.ends(stage) - 2 * look
        errors, fewest = [], []
        for number, ffn in enumerate(self.ffns):
            place = scratch / f"{ffn.layer}.safetensors"
            if place.is_file():
                kept = load_file(place)
                self._load(ffn, kept)
            else:
                now = time.monotonic()
                minutes = max(0.0, ends - now) / (len(self.ffns) - number) / 60
                clock = Clock(minutes, self.steps(stage), now, 0.0)
                steps, error = self._fit(ffn, inputs[ffn.layer], density[ffn.layer], clock, number)
                require_finite(error, METHOD, f"of {ffn.where} in the stage {stage}", "--layer-lr")
                kept = self._state(ffn) | {"error": torch.tensor([error]), "steps": torch.tensor([steps])}
                if is_first_process():
                    save_file(kept, place.with_suffix(".part"))
                    place.with_suffix(".part").replace(place)
            errors.append(float(kept["error"]))
            fewest.append(int(kept["steps"]))
        self.warn_if_cut_short(stage, min(fewest))
        self.trim()
        self.enter(stage)
        metrics = trainer.evaluate()
        last_row = self.checked_row(stage, min(fewest), metrics) | {"errors": errors}
        log.info("lte: %d FFNs fitted in %.0f s", len(errors), time.monotonic() - seconds)
        self.finish(stage, min(fewest), [last_row], start)
        return start

    def _densities(self, recorded: Mapping[int, Recorded], file: Path) -> dict[int, float]:
        """Number of the FFN → its share of neurons; the same share for all FFNs if no gradients are recorded."""
        even = 1 - self.settings.sparsity
        if not self.model.has_slopes:
            return {ffn.layer: even for ffn in self.ffns}
        if file.is_file():  # FFNs may have changed since, so the shares are not computed again
            return {int(layer): share for layer, share in json.loads(file.read_text()).items()}
        shares = densities(self.ffns, self.model.routing, recorded, even)
        if is_first_process():
            part = file.with_suffix(".part")
            part.write_text(json.dumps(shares))
            part.replace(file)
        return shares

    def _fit(self, ffn: FFNModules, recorded: Recorded, density: float, clock: Clock, number: int) -> tuple[int, float]:
        generator = torch.Generator().manual_seed(1000 * self.settings.seed + number)

        def progress(at: float) -> None:
            if self.progress is not None and is_first_process():
                self.progress(self.shown["layerwise"], round(100 * (number + at)), 100 * len(self.ffns))

        return LayerFit(ffn, self.model.routing, recorded, density, self.settings).run(clock, generator, progress)

    def _state(self, ffn: FFNModules) -> dict[str, Tensor]:
        modules = ffn.modules | {"router": self.model.routing.router(ffn.layer)}
        return {
            f"{name}.{key}": value.detach().contiguous()
            for name, module in modules.items()
            for key, value in module.state_dict().items()
        }

    def _load(self, ffn: FFNModules, kept: Mapping[str, Tensor]) -> None:
        for name, module in (ffn.modules | {"router": self.model.routing.router(ffn.layer)}).items():
            module.load_state_dict({key: kept[f"{name}.{key}"] for key in module.state_dict()})


class FollowRouted(FollowStage):
    """Adapts the weights of the losses in the soft stage, and the threshold in stages with hard masks."""

    stages: LTEStages

    def __init__(
        self, stages: LTEStages, stage: str, clock: Clock, start: float, kept: Mapping[str, Any] | None
    ) -> None:
        super().__init__(stages, stage, clock, start, kept)
        self.controller: Controller | None = None
        if stage == "soft":
            settings = stages.settings
            self.controller = Controller(1 - settings.sparsity, settings.efficiency)
            if kept is not None and kept.get("controller"):
                self.controller.restore(kept["controller"])
                stages.model.density = kept["density"]

    def begin_step(self, at: float) -> None:
        if self.controller is None:
            return
        model = self.stages.model
        if model.density is not None:
            model.eta = self.controller.step(at, _over_processes(model.density))
        if model.routing.masks == "scores":
            ramp = max(0.0, at - _SEPARATES) / (1 - _SEPARATES)
            model.lambda_ = self.stages.settings.separability * min(1.0, ramp)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        super().on_step_end(args, state, control, **given)
        if control.should_evaluate and self.stage == "hard":
            self.stages.trim()

    def end(self) -> None:
        self.stages.model.merge()
        if self.stage in ("soft", "hard"):
            self.stages.trim()

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        history_row = super().row(step, metrics)
        return history_row if self.controller is None else history_row | {"eta": self.stages.model.eta}

    def state(self) -> dict[str, Any]:
        state = super().state()
        if self.controller is not None:
            state["attributes"] |= {"controller": self.controller.state(), "density": self.stages.model.density}
        return state


def _over_processes(density: float) -> float:
    """The mean over all processes of a training, so that all processes use the same weights of losses."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return density
    mean = torch.tensor(density, dtype=torch.float64)
    if torch.distributed.get_backend() == "nccl":
        mean = mean.cuda()
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()
