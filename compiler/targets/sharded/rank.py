"""One rank's part of a model: its segments, between which the ranks join their tensors."""

from __future__ import annotations

from pathlib import Path

from trimtab.compiler.targets.decoded import decoded
from trimtab.compiler.targets.segmented.hook import Hook
from trimtab.compiler.targets.segmented.runner import SegmentedRunner
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.compiler.targets.session_segment import BoundSession, SessionSegment
from trimtab.compiler.targets.sessions import cache_of, open_session, session_options
from trimtab.compiler.targets.sharded.group import Group, device_of
from trimtab.compiler.targets.sharded.plan import Plan, Point


class Rank(SegmentedRunner):
    """The segments of `rank`.

    Args:
        folder: directory of the build.
        threads: CPU threads of one run.
        as_decoded: whether every token has its own choice of neurons, however long the call is.

    Attributes:
        joins: the hook between the segments; its group is set before the first run.
    """

    def __init__(self, folder: Path, plan: Plan, rank: int, threads: int, *, as_decoded: bool = False) -> None:
        self.joins = Joins(plan.segments)
        device = device_of(rank, plan.shards)
        segments = [_open(path, threads, device, as_decoded) for path in plan.files(folder, rank)]
        super().__init__(segments, plan.inputs, plan.outputs, hook=self.joins)


class Joins(Hook):
    """Joins the tensors behind each segment with those of the other ranks.

    Args:
        points: the points behind each segment.

    Attributes:
        group: the group of all ranks.
    """

    def __init__(self, points: tuple[tuple[Point, ...], ...]) -> None:
        self._points = points
        self.group: Group | None = None

    def after(self, number: int, segment: Segment, values: Values) -> Values:
        assert self.group is not None
        for point in self._points[number]:
            if point.how == "sum":
                self.group.sum(values[point.tensor])
            else:
                values[point.tensor] = self.group.concat(values[point.tensor])
        return values


def _open(path: Path, threads: int, device: str, as_decoded: bool) -> BoundSession:
    options, index = session_options(threads), int(device.partition(":")[2] or 0)
    as_decoded_model = decoded(path) if as_decoded else None
    if as_decoded_model is not None:
        folder = str(path.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = open_session(as_decoded_model or path, options, device=index)
    name = f"{path.name} of the model"
    return BoundSession(SessionSegment(session, name=name, cache=cache_of(path, session), device=device))
