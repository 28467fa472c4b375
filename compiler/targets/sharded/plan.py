"""The plan of a build in shards: the files of each rank, and the tensors that the ranks join."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.compiler.targets.base import MODEL, PLAN
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.contract import PassResult
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import save_graph
from trimtab.passes.graph.cut import cut
from trimtab.passes.graph.io import WeightFile
from trimtab.passes.shard import divide

_WEIGHTS = MODEL.parent / "weights.data"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Model):
    """A tensor at the end of a segment, of which every rank has its own value.

    Attributes:
        how: "sum" joins the values by their sum, "concat" along the last axis.
    """

    tensor: str
    how: Literal["sum", "concat"]


class Plan(_Model):
    """The plan of all ranks.

    Attributes:
        inputs, outputs: names of the whole model's inputs and outputs.
        segments: the points at the end of each segment, in the order in which segments run.
    """

    shards: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    segments: tuple[tuple[Point, ...], ...]

    def files(self, folder: Path, rank: int) -> list[Path]:
        """The ONNX files of `rank`, one for each segment, in the build directory `folder`."""
        return [_file(folder, rank, number) for number in range(len(self.segments))]


def _file(folder: Path, rank: int, segment: int) -> Path:
    return folder / MODEL.parent / f"rank{rank}.segment{segment}.onnx"


def write_shards(graph: gs.Graph, shards: int, folder: Path) -> tuple[PassResult, list[Path]]:
    """Divide `graph` and write it into the build directory `folder`; weights that ranks share are stored once.

    Returns:
        The pass result of the division, and the ONNX files.
    """
    if any(tensor.dtype is None for node in graph.nodes for tensor in node.outputs):
        infer_shapes(graph)  # a tensor that crosses a cut needs a type
    written: list[Path] = []
    with WeightFile(folder / _WEIGHTS) as weights:
        for number in range(shards):
            rank = divide(graph, number, shards)
            how = {join.tensor.name: join.how for join in rank.joins}
            segments = cut(rank.graph, [join.tensor for join in rank.joins])
            for place, segment in enumerate(segments):
                written.append(_file(folder, number, place))
                save_graph(segment.graph, written[-1], weights=weights)
    plan = Plan(
        shards=shards,
        inputs=tuple(tensor.name for tensor in graph.inputs),
        outputs=tuple(tensor.name for tensor in graph.outputs),
        segments=tuple(tuple(Point(tensor=name, how=how[name]) for name in s.points) for s in segments),
    )
    (folder / PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
    return rank.result, written


def read_plan(folder: Path) -> Plan:
    """The plan of the build in `folder`.

    Raises:
        TargetError: the plan is missing or damaged.
    """
    try:
        return Plan.model_validate_json((folder / PLAN).read_bytes())
    except (OSError, ValidationError) as error:
        raise TargetError(f"{folder / PLAN}: cannot be read ({error})", hint="compile the model again") from error
