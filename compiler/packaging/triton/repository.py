"""A model repository of Triton Inference Server, written whole or not at all.

REPO/NAME/            text in: labels, a score, an embedding, or generated text (Python backend)
REPO/NAME_engine/     tensors in and out: what the build compiled (onnxruntime, tensorrt or Python backend)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.builds.build import Build, check_outside
from trimtab.compiler.packaging.triton import config as configs
from trimtab.compiler.packaging.triton.models import Models
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.passes.errors import BuildError, ModelError, TargetError
from trimtab.passes.os_errors import blames, reason, remedy, unreadable
from trimtab.passes.temporary import temporary_folder

BACKENDS = ("auto", "onnxruntime", "python", "tensorrt")


@dataclass(frozen=True)
class Package:
    """A written repository.

    Attributes:
        path: the folder for `tritonserver --model-repository`.
        name: name of the build in the repository.
        backend: backend of the model that runs the build.
        kind: kind of the text model's answers, one of the task's: "classes", "labels", "score", "embedding", "states"
            (the answer is their mean, an embedding) or "text"; None if there is no text model.
        why: the reason why there is no text model.
        models: names of the models, in the order in which requests pass through them.
    """

    path: Path
    name: str
    backend: str
    kind: str | None
    why: str | None
    models: tuple[str, ...]


def package_triton(
    build: Build,
    out: Path | str,
    *,
    name: str | None = None,
    backend: str = "auto",
    batch: int | None = None,
    gpu: bool | None = None,
    mounted_at: Path | str | None = None,
    environment: str | None = None,
) -> Package:
    """Write `out`, whole or not at all.

    Args:
        name: name of the text model; the engine's name is the same with "_engine". Default: the build folder's name.
        backend: one of `BACKENDS`; "auto" is the target's own.
        batch: maximum number of samples that Triton joins in one call; by default the maximum of the workload.
        gpu: whether models run on the GPU; by default only TensorRT's do.
        mounted_at: path at which the server sees `out`, if it differs: the configuration of the ONNX Runtime backend
            contains the path of the native kernels.
        environment: EXECUTION_ENV_PATH of the Python models: an archive or folder with an environment.

    Raises:
        BuildError: `out` exists or cannot be written, the build was replaced, or tritonclient is not installed.
        ModelError, TargetError: Triton cannot serve the build; the message says why.
    """
    out = Path(out).absolute()
    model_name, max_batch = check_package(build, out, name=name, batch=batch)
    chosen_backend = check_backend(build, backend)
    models = Models(
        build=build,
        name=model_name,
        backend=chosen_backend,
        batch=max_batch,
        gpu=chosen_backend == "tensorrt" if gpu is None else gpu,
        seen_at=Path(mounted_at) if mounted_at else out,
        environment=environment,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder("package", out.parent) as scratch:
            part = scratch / "repository"
            part.mkdir()
            with build.unchanged():
                kind, why, names = models.write(part)
            part.rename(out)
    except OSError as error:
        if not blames(error, out.parent):
            raise unreadable(error.filename, error, BuildError) from error
        raise BuildError(f"{out}: cannot be written ({reason(error)})", hint=remedy(error, out.parent)) from error
    return Package(out, models.name, "python" if kind == "text" else chosen_backend, kind, why, names)


def check_package(build: Build, out: Path, *, name: str | None, batch: int | None) -> tuple[str, int]:
    """Check the arguments of `package_triton` before any file is written.

    Returns:
        The model's name, and the maximum number of samples in one call.

    Raises:
        BuildError: as in `package_triton`.
    """
    if out.exists():
        raise BuildError(f"{out}: exists already", hint="give a folder that does not exist")
    check_outside(out)
    configs.schema()
    return _model_name(build, name), _batch(build, batch)


def _model_name(build: Build, name: str | None) -> str:
    """`name`, or one made of the name of the build's folder."""
    model_name = re.sub(r"[^A-Za-z0-9_.-]", "_", build.path.resolve().name if name is None else name).strip(".")
    if not model_name or name not in (None, model_name):
        raise BuildError(
            f"{name or build.path.name!r}: is not a valid name for a Triton model",
            hint="give a name of letters, digits, '_', '-' and '.' with --name",
        )
    return model_name


def _batch(build: Build, batch: int | None) -> int:
    low, _, high = build.manifest.workload["batch"]
    if batch is not None and not low <= batch <= high:
        raise BuildError(f"batches of {batch}: the build's workload has {low} to {high}", hint="compile it for more")
    return int(batch or high)


def check_backend(build: Build, backend: str) -> str:
    """The backend for the option `backend`, one of `BACKENDS`, with `build`.

    Raises:
        BuildError, ModelError, TargetError: the backend is unknown, or cannot run the build.
    """
    target, folder = build.manifest.target, build.path
    if backend not in BACKENDS:
        raise BuildError(f"unknown backend {backend!r}", hint=f"known: {', '.join(BACKENDS)}")
    if build.manifest.shards > 1:
        raise ModelError(
            f"{folder}: is divided into {build.manifest.shards} shards, and Triton runs a model in one process",
            hint="compile it without --shards",
        )
    if backend == "auto":
        if target == "tensorrt-rtx":
            raise TargetError(
                f"{folder}: holds an engine of TensorRT-RTX, and Triton's backend loads those of TensorRT alone",
                hint="compile with --target tensorrt, or serve the same graph with --backend onnxruntime or python",
            )
        backend = target
    if backend == "tensorrt" and target != "tensorrt":
        raise TargetError(f"{folder}: was built for {target}", hint="compile with --target tensorrt")
    if backend == "tensorrt" and EngineInfo.read(folder / ENGINE).exits is not None:
        raise TargetError(
            f"{folder}: samples leave between its engines, and a Triton ensemble passes on whole batches",
            hint="compile it as one engine (`engine: {segments: 1}`), or serve its graph with --backend python",
        )
    return backend
