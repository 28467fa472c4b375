"""engine/engine.json: facts about a build's engines, read before an engine is loaded, and by packaging.

`engines` are in the order in which they run. An output with the name of a later engine's input is passed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.compiler.targets.segmented.compaction import Compaction, Exit, Layout
from trimtab.compiler.targets.segmented.route import Route
from trimtab.passes.errors import TargetError

INFO_FILE = "engine.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tensor(_Model):
    """An input or output of an engine; -1 is a dynamic size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class ProfileInfo(_Model):
    """An optimization profile: input → (min, opt, max) shape. TensorRT's number of a profile is its index."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class EngineFile(_Model):
    """One engine of the build.

    Attributes:
        file: name of the engine file, next to engine.json.
        profiles: optimization profiles, the general one first.
    """

    file: str = Field(pattern=r"^[^/\\\x00]+$")
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[ProfileInfo, ...]


class ExitPoint(_Model):
    """A point where samples leave, behind the engine number `after`.

    Attributes:
        stays: name of a bool tensor, [batch]: the samples that go on.
        outputs: output of the whole model → the tensor that holds it for a sample that leaves.
    """

    after: int
    stays: str
    outputs: dict[str, str]


class ExitsInfo(_Model):
    """Exits between engines, and the layout of the tensors that cross them.

    Attributes:
        batched: tensors with a row for each sample.
        packed: tensor with a row for each token → tensor of its offsets, [batch + 1].
        common: tensors that are the same for all samples.
    """

    points: tuple[ExitPoint, ...]
    batched: tuple[str, ...] = ()
    packed: dict[str, str] = {}
    common: tuple[str, ...] = ()

    def hook(self) -> Compaction:
        """The hook that runs between the engines."""
        layout = Layout(frozenset(self.batched), self.packed, frozenset(self.common))
        return Compaction([Exit(point.after, point.stays, point.outputs) for point in self.points], layout)


class EngineInfo(_Model):
    """Facts about the engines of a build.

    Attributes:
        library, version: the library that built the engines; another version refuses them.
        precisions: types of all tensors between layers, by TensorRT's names.
        compute_capabilities: GPUs that the recipe names, such as "8.9"; empty where the library chose.
        gpu: compute capability of the GPU that the engines were built on, the only one that runs them; None where the
            build needed no GPU.
        weight_streaming, refit: whether the engines were built with these options.
        lowered: op → number of its nodes that were replaced by standard ops.
        inputs, outputs: names of the whole model's inputs and outputs, in order. A tensor between engines may be among
            them.
        exits: exits between engines; None without exits.
    """

    target: str
    library: str
    version: str
    precisions: tuple[str, ...]
    compute_capabilities: tuple[str, ...] = ()
    gpu: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    lowered: dict[str, int] = {}
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    exits: ExitsInfo | None = None
    engines: tuple[EngineFile, ...]

    @classmethod
    def read(cls, folder: Path) -> EngineInfo:
        """Read engine.json of the engines in `folder`.

        Raises:
            TargetError: the file is missing or damaged.
        """
        path = folder / INFO_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise TargetError(f"{path}: is missing or not valid ({reason})", hint="compile it again") from error

    def route(self, inputs: Sequence[str], outputs: Sequence[str]) -> Route:
        """The route of tensors through the engines of a model with these inputs and outputs.

        Raises:
            TargetError: a tensor that an engine reads has no source.
        """
        sides = [([t.name for t in engine.inputs], [t.name for t in engine.outputs]) for engine in self.engines]
        return Route.of(sides, inputs, outputs)

    def write(self, folder: Path) -> Path:
        path = folder / INFO_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    def check(self, folder: Path, version: str | None, gpu: str | None) -> None:
        """Check that a library of `version`, on a GPU of compute capability `gpu`, takes these engines.

        Args:
            version: None if unknown.
            gpu: None if unknown.

        Raises:
            TargetError: version or GPU do not fit; names both sides.
        """
        if version is not None and version != self.version:
            raise TargetError(
                f"{folder}: these engines need {self.library} {self.version}, and {version} is installed",
                hint=f"install {self.library} {self.version}, or compile the model again",
            )
        if gpu is None:
            return
        fit = (self.gpu,) if self.gpu is not None else self.compute_capabilities
        if fit and gpu not in fit:
            raise TargetError(
                f"{folder}: these engines run on GPUs of compute capability {', '.join(fit)}, and this one has {gpu}",
                hint="compile the model again on this machine"
                if self.gpu is not None
                else "compile the model again with this GPU among `engine: {gpus: [...]}`",
            )
