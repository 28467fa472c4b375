"""TensorRT engines as Triton models: one engine, or several in an ensemble, which passes on tensors on the GPU."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.packaging.triton import config as configs
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.tensorrt.info import EngineFile, EngineInfo, Tensor

VERSION = "1"
_PLAN = "model.plan"
_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16"}
"""TensorRT's names of types → numpy's, where they differ."""


def write_engines(build: Build, folder: Path, name: str, *, batch: int, gpu: bool) -> list[str]:
    """Write the model `name`, and for several engines one model each, `name`_0 and so on; returns all names.

    Args:
        batch: maximum number of samples that Triton joins, if they are the first dimension of every engine.
    """
    info = EngineInfo.read(build.path / ENGINE)
    whole = configs.is_batched(
        (*build.manifest.inputs, *build.manifest.outputs)
    )  # an engine's own dimensions have no names
    joined = batch if whole and all(_is_batched(e, build.manifest.workload["batch"]) for e in info.engines) else 0
    names = [name] if len(info.engines) == 1 else [f"{name}_{number}" for number in range(len(info.engines))]
    for each, engine in zip(names, info.engines, strict=True):
        version = folder / each / VERSION
        version.mkdir(parents=True)
        shutil.copyfile(build.path / ENGINE / engine.file, version / _PLAN)
        inputs, outputs = _infos(engine.inputs), _infos(engine.outputs)
        config = configs.model_config(each, "tensorrt", inputs, outputs, batch=joined, gpu=gpu)
        config.default_model_filename = _PLAN
        for key, value in (("library", info.library), ("version", info.version), ("gpu", info.gpu or "any")):
            config.parameters[f"trimtab.{key}"].string_value = value
        opt = {key: shapes[1] for key, shapes in engine.profiles[0].shapes.items()}
        configs.add_warmup(config, folder / each, inputs, opt)
        configs.write_config(config, folder / each)
    if len(names) > 1:
        (folder / name / VERSION).mkdir(parents=True)  # Triton requires a version of an ensemble, though it is empty
        ends = build.manifest.engine_inputs, build.manifest.outputs
        route = info.route(*([tensor.name for tensor in end] for end in ends))
        config = ensemble_config(name, *ends, names, route, batch=joined)
        configs.write_config(config, folder / name)
        names.insert(0, name)
    return names


def ensemble_config(
    name: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    models: Sequence[str],
    route: Route,
    *,
    batch: int,
) -> Any:
    """An ensemble of `models`, which pass on the tensors of `route`, as the runner of several segments does."""
    config = configs.model_config(name, "", inputs, outputs, batch=batch)
    for field in ("backend", "instance_group", "dynamic_batching"):  # only the steps have these
        config.ClearField(field)
    config.platform = "ensemble"
    for model, leg in zip(models, route.legs, strict=True):
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map.update({tensor: tensor for tensor in leg.reads})
        step.output_map.update({tensor: tensor for tensor in leg.gives})
    return config


def _is_batched(engine: EngineFile, batch: Sequence[int]) -> bool:
    """Whether the first dimension of every tensor is the batch: it has its size in every shape of the profile."""
    shapes = engine.profiles[0].shapes.values()
    firsts = [[size[0] if size else None for size in levels] for levels in shapes]
    return all(first == list(batch) for first in firsts) and all(
        tensor.shape and tensor.shape[0] < 0 for tensor in (*engine.inputs, *engine.outputs)
    )


def _infos(tensors: Sequence[Tensor]) -> list[TensorInfo]:
    return [
        TensorInfo(
            name=tensor.name,
            dtype=_NAMES.get(tensor.dtype, tensor.dtype),
            shape=tuple(None if size < 0 else size for size in tensor.shape),
        )
        for tensor in tensors
    ]
