"""engine/engine.json: what engines are, and on what they run. Read before an engine is loaded, and by packaging.

`engines` are in the order in which they run; what one puts out under the name of a later one's input is handed on.
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
    """An optimization profile: input → (min, opt, max) shape. Its number is its place."""

    name: str
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


class EngineFile(_Model):
    """One engine of the build.

    Attributes:
        file: its name, beside engine.json.
        profiles: the general one first.
    """

    file: str = Field(pattern=r"^[^/\\\x00]+$")
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profiles: tuple[ProfileInfo, ...]


class ExitPoint(_Model):
    """Where samples leave: behind the engine of the number `after`.

    Attributes:
        stays: tensor of bool, [batch]: the samples that go on.
        outputs: output of the whole model → the tensor that holds it for a sample that leaves.
    """

    after: int
    stays: str
    outputs: dict[str, str]


class ExitsInfo(_Model):
    """Exits between engines, and how what they hand on holds its samples.

    Attributes:
        batched: tensors with a row for each sample.
        packed: tensor with a row for each token → where each sample begins in it, [batch + 1].
        common: tensors that are the same for all samples.
    """

    points: tuple[ExitPoint, ...]
    batched: tuple[str, ...] = ()
    packed: dict[str, str] = {}
    common: tuple[str, ...] = ()

    def hook(self) -> Compaction:
        """What is done between the engines."""
        layout = Layout(frozenset(self.batched), self.packed, frozenset(self.common))
        return Compaction([Exit(point.after, point.stays, point.outputs) for point in self.points], layout)


class EngineInfo(_Model):
    """What is worth knowing of the engines of a build.

    Attributes:
        library, version: what built them; another version refuses them.
        precisions: types of all tensors between their layers, by TensorRT's names.
        compute_capabilities: GPUs that they were asked to run on, such as "8.9"; empty where the library chose.
        gpu: compute capability of the GPU that they were built on, and run on alone; None where none was needed.
        weight_streaming, refit: whether they were built so.
        lowered: op → how many of it were given in standard ops.
        inputs, outputs: names of the whole model's, in its order. What one engine hands to the next may be among them.
        exits: where samples leave between two engines; None where none do.
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
        """Of the engines in `folder`.

        Raises:
            TargetError: there are none, or the file is damaged.
        """
        path = folder / INFO_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise TargetError(f"{path}: says nothing of the engines ({said})", hint="compile it again") from error

    def route(self, inputs: Sequence[str], outputs: Sequence[str]) -> Route:
        """Which tensor goes where among the engines of a model with these inputs and outputs.

        Raises:
            TargetError: nothing gives a tensor that an engine reads.
        """
        sides = [([t.name for t in engine.inputs], [t.name for t in engine.outputs]) for engine in self.engines]
        return Route.of(sides, inputs, outputs)

    def write(self, folder: Path) -> Path:
        path = folder / INFO_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n")
        return path

    def check(self, folder: Path, version: str | None, gpu: str | None) -> None:
        """That a library of `version`, on a GPU of compute capability `gpu`, takes these engines; None: not known.

        Raises:
            TargetError: it does not; says which wants which.
        """
        if version is not None and version != self.version:
            raise TargetError(
                f"{folder}: these engines are of {self.library} {self.version}, and here is {version}",
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
