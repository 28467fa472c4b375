"""A model repository of Triton Inference Server, written whole or not at all.

REPO/NAME/            text in: labels, a score, an embedding, or generated text (Python backend)
REPO/NAME_engine/     tensors in and out: what the build compiled (onnxruntime, tensorrt or Python backend)
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.builds.build import Build
from trimtab.compiler.packaging.triton import config as configs
from trimtab.compiler.packaging.triton.models import Models
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.passes.errors import BuildError, ModelError, TargetError
from trimtab.passes.os_errors import blames, reason, remedy, unreadable

BACKENDS = ("auto", "onnxruntime", "python", "tensorrt")


@dataclass(frozen=True)
class Package:
    """A written repository.

    Attributes:
        path: the folder for `tritonserver --model-repository`.
        name: of the build in it.
        backend: of the model that runs the build.
        kind: what the text model answers with, of the task's kinds: "classes", "labels", "score", "embedding", "states"
            (an embedding, their mean) or "text"; None where there is no text model.
        why: there is none.
        models: names, in the order in which requests pass through them.
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
        name: of the text model; the engine's is the same with "_engine". By default that of the build's folder.
        backend: one of `BACKENDS`; "auto" is the target's own.
        batch: the most samples that Triton joins in one call; by default the most that the workload declares.
        gpu: whether models lie on the GPU; by default those of TensorRT do.
        mounted_at: where the server will see `out`, if elsewhere: ONNX Runtime's backend wants the native kernels by a
            path that it can open.
        environment: EXECUTION_ENV_PATH of the Python models: an archive or folder of an environment.

    Raises:
        BuildError: `out` exists or cannot be written, the build was replaced, or tritonclient is not installed.
        ModelError, TargetError: the build is of a kind that Triton does not serve; says why.
    """
    out = Path(out).absolute()
    model_name, most = check_package(build, out, name=name, batch=batch)
    chosen = check_backend(build, backend)
    models = Models(
        build=build,
        name=model_name,
        backend=chosen,
        batch=most,
        gpu=chosen == "tensorrt" if gpu is None else gpu,
        seen_at=Path(mounted_at) if mounted_at else out,
        environment=environment,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            part = Path(scratch) / "repository"
            part.mkdir()
            with build.unchanged():
                kind, why, names = models.write(part)
            part.rename(out)
    except OSError as error:
        if not blames(error, out.parent):
            raise unreadable(error.filename, error, BuildError) from error
        raise BuildError(f"{out}: cannot be written ({reason(error)})", hint=remedy(error, out.parent)) from error
    return Package(out, models.name, "python" if kind == "text" else chosen, kind, why, names)


def check_package(build: Build, out: Path, *, name: str | None, batch: int | None) -> tuple[str, int]:
    """The model's name and the most samples in one call, of the arguments of `package_triton`, before anything is made.

    Raises:
        BuildError: as `package_triton`.
    """
    if out.exists():
        raise BuildError(f"{out}: exists already", hint="give a folder that does not")
    configs.schema()
    return _model_name(name or build.path.resolve().name), _batch(build, batch)


def _model_name(name: str) -> str:
    found = re.sub(r"[^A-Za-z0-9_.-]", "_", name).strip(".")
    if not found:
        raise BuildError(f"{name!r}: no name for a model in Triton", hint="give one of letters and digits with --name")
    return found


def _batch(build: Build, asked: int | None) -> int:
    low, _, high = build.manifest.workload["batch"]
    if asked is not None and not low <= asked <= high:
        raise BuildError(f"batches of {asked}: the build's workload has {low} to {high}", hint="compile it for more")
    return int(asked or high)


def check_backend(build: Build, asked: str) -> str:
    """The backend that `asked`, one of `BACKENDS`, stands for with `build`.

    Raises:
        BuildError, ModelError, TargetError: unknown, or not one that can run the build.
    """
    target, folder = build.manifest.target, build.path
    if asked not in BACKENDS:
        raise BuildError(f"unknown backend {asked!r}", hint=f"known: {', '.join(BACKENDS)}")
    if build.manifest.shards > 1:
        raise ModelError(
            f"{folder}: is divided into {build.manifest.shards} shards, and Triton runs a model in one process",
            hint="compile it without --shards",
        )
    if asked == "auto":
        if target == "tensorrt-rtx":
            raise TargetError(
                f"{folder}: holds an engine of TensorRT-RTX, and Triton's backend loads those of TensorRT alone",
                hint="compile with --target tensorrt, or serve the same graph with --backend onnxruntime or python",
            )
        asked = target
    if asked == "tensorrt" and target != "tensorrt":
        raise TargetError(f"{folder}: was built for {target}", hint="compile with --target tensorrt")
    if asked == "tensorrt" and EngineInfo.read(folder / ENGINE).exits is not None:
        raise TargetError(
            f"{folder}: samples leave between its engines, and an ensemble of Triton hands on whole batches",
            hint="compile it as one engine (`engine: {segments: 1}`), or serve its graph with --backend python",
        )
    return asked
