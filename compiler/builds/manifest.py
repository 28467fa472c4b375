"""The manifest: the description of a build, in one JSON file that is strictly validated when it is read."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.compiler.checks.measure import OutputError
from trimtab.compiler.engine_options import MAX_THREADS
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.schema.explain import explain
from trimtab.compiler.task import Task
from trimtab.compiler.workload import Workload
from trimtab.passes.contract import PassResult
from trimtab.passes.dials import Dial, Dials, SpeedPoint
from trimtab.passes.errors import BuildError, ModelError, RecipeError, short
from trimtab.passes.graph.limits import Packed, Positions
from trimtab.passes.graph.ranges import index_bounds
from trimtab.passes.os_errors import unreadable

NAME = "manifest.json"
HASH = "manifest.sha256"
"""The file next to the manifest with its hash, in the format of `sha256sum --check`."""

FORMAT = 2
_PACKAGES = (
    "trimtab", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "tensorrt-rtx", "tensorrt", "torch",
)  # fmt: skip


_MAX_SIZE = 1 << 24
"""Maximum of a fixed dimension of an input or output."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileInfo(_Model):
    """One file of the build."""

    sha256: str
    bytes: int


class TensorInfo(_Model):
    """One input or output of the engine.

    Attributes:
        shape: a dynamic dimension is its name, or None if the model does not name it.
        bounds: minimum and maximum of an input that indexes a table.
    """

    name: str
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0, le=_MAX_SIZE)] | str | None, ...] | None
    bounds: tuple[int, int] | None = None

    @field_validator("dtype")
    @classmethod
    def _is_known(cls, name: str) -> str:
        try:
            if str(np.dtype(name)) == name:
                return name
        except (TypeError, ValueError, SyntaxError):  # NumPy parses some names as Python
            pass
        raise ValueError(f"{short(name)!r} is no type of NumPy's")

    @classmethod
    def of(cls, tensor: gs.Tensor) -> TensorInfo:
        shape = None if tensor.shape is None else tuple(tensor.shape)
        if any(isinstance(size, int) and size > _MAX_SIZE for size in shape or ()):
            raise ModelError(
                f"{tensor.name!r} has the shape {list(shape or ())}: a fixed dimension is at most {_MAX_SIZE}",
                hint="export the model with a dynamic or a smaller dimension",
            )
        return cls(name=tensor.name, dtype=str(np.dtype(tensor.dtype)), shape=shape, bounds=index_bounds(tensor))


class LeftPlace(_Model):
    """A place that a pass did not change."""

    where: str
    why: str


class PassReport(_Model):
    """The result of a pass: number of places changed, places left unchanged, and details for the report."""

    name: str
    changed: int
    left: tuple[LeftPlace, ...] = ()
    details: dict[str, Any] = {}

    @classmethod
    def of(cls, result: PassResult) -> PassReport:
        left = tuple(LeftPlace(where=place.where, why=place.why) for place in result.left)
        return cls(name=result.name, changed=result.changed, left=left, details=result.details)


class Sizes(_Model):
    """Bytes of the weights, dense and compiled. `compiled_ffn_bytes` is None if no pass reports it."""

    dense_bytes: int
    compiled_bytes: int
    dense_ffn_bytes: int
    compiled_ffn_bytes: int | None = None


class SelfCheck(_Model):
    """Comparison of the finished engine with the dense model, on random inputs of one shape.

    Attributes:
        ran: False if the check was skipped.
        why: the reason why it was skipped.
        outputs: the error of each output.
    """

    ran: bool
    why: str | None = None
    outputs: tuple[OutputError, ...] = ()


class _Recorded(BaseModel):
    """The parts of a manifest's recipe that are read when the build is used; the rest is stored unchecked."""

    model_config = ConfigDict(extra="allow", frozen=True)

    passes: tuple[dict[str, Any], ...]
    workload: Workload
    threads: int | None = Field(ge=1, le=MAX_THREADS)
    calibration: Calibration = Calibration()


class Manifest(_Model):
    """The description of a build.

    Attributes:
        tool, format: distinguish this file from others of the same name.
        key: hash of all inputs of the build; the same inputs give the same key.
        created: UTC, ISO 8601.
        origin: the model as the user named it.
        source: the ONNX file that was compiled, which may be in the cache.
        graph: hash of that file.
        fingerprint: hash of the dense model's weights.
        family, labels, max_tokens: properties of the model.
        task: what the model is for; decides how it is evaluated and served. None if trimtab knows no use for its
            outputs.
        inputs, outputs: tensors of the engine, without its dials.
        dials: numbers that a call may set; further inputs of the engine, float32 [batch].
        speed: the path through the dials' values that `speed` follows.
        positions: limits the length of texts; None if the model's positions do not limit it.
        packed: masks that attention reads as counts of tokens.
        target, capability: the runtime the build is for, and what that runtime can do.
        shards: number of processes among which the model is divided.
        recipe: the recipe with every default filled in.
        data, profile: hashes of the calibration data and of the Profile.
        profile_origin: the file of the Profile, or the data on which it was measured.
        versions: versions of the packages involved.
        passes: the result of each pass, in order.
        files: every file that is read when the build is used, except the manifest, by its path in the build.
        seconds: phase → duration.
        peak_memory_bytes: peak RSS of the compiling process since its start; None if unknown.
        check: result of the check of the engine before the commit.
    """

    tool: Literal["trimtab"] = "trimtab"
    format: int = FORMAT
    key: str
    created: str
    origin: str
    source: str
    graph: str
    fingerprint: str
    family: str
    labels: tuple[str, ...] | None = None
    max_tokens: int | None = None
    task: Task | None = None
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    dials: tuple[Dial, ...] = ()
    speed: tuple[SpeedPoint, ...] = ()
    positions: Positions | None = None
    packed: tuple[Packed, ...] = ()
    target: str
    shards: int = 1
    capability: dict[str, Any]
    recipe: dict[str, Any]
    data: str | None = None
    profile: str | None = None
    profile_origin: str | None = None
    versions: dict[str, str]
    passes: tuple[PassReport, ...]
    files: dict[str, FileInfo] = Field(default_factory=dict)
    sizes: Sizes
    seconds: dict[str, float]
    peak_memory_bytes: int | None = None
    check: SelfCheck

    @field_validator("recipe")
    @classmethod
    def _usable(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        return recipe | _Recorded.model_validate(recipe).model_dump(mode="json", include={"workload", "calibration"})

    @field_validator("versions")
    @classmethod
    def _names_trimtab(cls, versions: dict[str, str]) -> dict[str, str]:
        if "trimtab" not in versions:
            raise ValueError("lacks 'trimtab'")
        return versions

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileInfo]) -> dict[str, FileInfo]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name:
                raise ValueError(f"file {name!r} lies outside the build")
        return files

    @property
    def vocabulary(self) -> int | None:
        """Size of the vocabulary; None if the graph does not show it."""
        return next((t.bounds[1] + 1 for t in self.inputs if t.name == "input_ids" and t.bounds is not None), None)

    @property
    def engine_inputs(self) -> tuple[TensorInfo, ...]:
        """All inputs of the engine: `inputs`, followed by the dials."""
        batch = (self.inputs[0].shape or (None,))[:1] if self.inputs else (None,)
        return (*self.inputs, *(TensorInfo(name=dial.name, dtype="float32", shape=batch) for dial in self.dials))

    @property
    def all_dials(self) -> Dials:
        """`dials` with their path."""
        return Dials(self.dials, self.speed)

    @property
    def workload(self) -> dict[str, Any]:
        workload: dict[str, Any] = self.recipe["workload"]
        return workload


def is_build(folder: Path) -> bool:
    """Whether `folder` holds a build, of any format, complete or damaged."""
    try:
        path = folder / NAME
        _Format.model_validate_json(path.read_bytes() if path.is_file() else b"")
    except (OSError, ValidationError):
        return False
    return True


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of the build in `folder`, and its sha256, verified against the file next to it.

    Raises:
        BuildError: `folder` has no build, or one of another format, or a damaged one.
    """
    path = folder / NAME
    again = "compile it again"
    try:
        for part in (path, folder / HASH):
            if part.exists() and not part.is_file():  # reading a pipe would wait for its writer
                raise BuildError(f"{part}: damaged: it is no regular file", hint=again)
        text = path.read_bytes()
        form = _Format.model_validate_json(text).format
        if form != FORMAT:
            raise BuildError(f"{folder}: is a build of format {form}, and this trimtab reads {FORMAT}", hint=again)
        digest = hashlib.sha256(text).hexdigest()
        if (folder / HASH).read_text(encoding="utf-8") != hash_line(digest):
            raise BuildError(f"{path}: damaged: its sha256 is not that of {HASH}", hint=again)
        return Manifest.model_validate_json(text), digest
    except FileNotFoundError as error:
        if path.is_file():
            raise BuildError(f"{folder / HASH}: missing from the build", hint=again) from error
        raise BuildError(f"{folder}: not a build: it has no {NAME}", hint="make one with `trimtab compile`") from error
    except (ValidationError, RecipeError) as error:
        why = explain(error, Manifest).message if isinstance(error, ValidationError) else error.message
        raise BuildError(f"{path}: damaged, or not of trimtab: {why}", hint=again) from error
    except UnicodeDecodeError as error:
        raise BuildError(f"{folder / HASH}: damaged", hint=again) from error
    except OSError as error:
        raise unreadable(error.filename or path, error, BuildError) from error


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write `manifest` and its hash file into `folder`; returns the hash."""
    text = manifest.model_dump_json(indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_text(folder / NAME, text)
    write_text(folder / HASH, hash_line(digest))
    return digest


def hash_line(digest: str) -> str:
    """The content of the file `HASH`."""
    return f"{digest}  {NAME}\n"


class _Format(BaseModel):
    tool: Literal["trimtab"]
    format: int


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, and flush it to the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that influence a build."""
    return {name: installed for name in _PACKAGES if (installed := _version(name))}


@lru_cache
def _version(package: str) -> str | None:
    try:
        return version(package) + (f"+{_code()}" if package == "trimtab" else "")
    except PackageNotFoundError:
        return None


def _code() -> str:
    """A hash of trimtab's own code, so that a build of other code is not reused, even between releases."""
    digest = hashlib.sha256()
    for package in ("compiler", "passes", "plugins"):
        for folder in import_module(f"trimtab.{package}").__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
