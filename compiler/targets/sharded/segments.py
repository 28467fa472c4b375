"""One rank's part of a model: its segments, run one after the other, with the other ranks joined in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime as ort

from trimtab.compiler.targets.base import Steps
from trimtab.compiler.targets.decoded import decoded
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner, session_options
from trimtab.compiler.targets.onnxruntime_steps import PAST, PRESENT, Cache, step_feeds
from trimtab.compiler.targets.sharded.group import Group, device_of
from trimtab.compiler.targets.sharded.plan import Plan, Point
from trimtab.passes.errors import TargetError

Values: TypeAlias = dict[str, ort.OrtValue | np.ndarray]
"""What segments hand on, by name."""

_FLOATS = ("tensor(float)", "tensor(float16)")


@dataclass(frozen=True)
class _Segment:
    """A loaded segment.

    Attributes:
        inputs, outputs: names; last: tensors that no later segment reads.
        cache: of the part of a decoder's cache that it reads; None where it reads none.
    """

    path: Path
    session: ort.InferenceSession
    inputs: tuple[str, ...]
    outputs: dict[str, str]
    points: tuple[Point, ...]
    last: frozenset[str]
    cache: Cache | None


class Segments:
    """The segments of `rank`.

    Args:
        folder: of the build.
        as_decoded: every token by its own choice, however many there are.

    Attributes:
        group: through which the ranks meet; set before the first run.
    """

    def __init__(self, folder: Path, plan: Plan, rank: int, threads: int, *, as_decoded: bool = False) -> None:
        self.group: Group | None = None
        self.plan, self.rank = plan, rank
        self.device = device_of(rank, plan.shards)
        runners = [self._open(path, threads, as_decoded) for path in plan.files(folder, rank)]
        seen: set[str] = set(plan.outputs)
        self.segments: list[_Segment] = []
        for path, runner, points in reversed(list(zip(plan.files(folder, rank), runners, plan.segments, strict=True))):
            outputs = {tensor.name: tensor.type for tensor in runner.session.get_outputs()}
            last = frozenset(runner.inputs) - seen
            cache = Cache.of(path) if any(name.startswith(PAST) for name in runner.inputs) else None
            self.segments.insert(0, _Segment(path, runner.session, runner.inputs, outputs, points, last, cache))
            seen |= set(runner.inputs)

    def _open(self, path: Path, threads: int, as_decoded: bool) -> OnnxRuntimeRunner:
        options = session_options(threads)
        index = int(self.device.partition(":")[2] or 0)
        changed = decoded(path) if as_decoded else None
        if changed is None:
            return OnnxRuntimeRunner(path, options, device=index)
        folder = str(path.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return OnnxRuntimeRunner(changed, options, device=index)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values: Values = dict(inputs)
        for segment in self.segments:
            self.advance(segment, values, segment.session.io_binding(), {})
        return {name: _array(values[name]) for name in self.plan.outputs}

    def advance(self, segment: _Segment, values: Values, binding: ort.IOBinding, fixed: Mapping[str, object]) -> None:
        """Run `segment`: it takes its inputs from `values`, and puts its outputs there, joined where ranks meet.

        Args:
            fixed: inputs and outputs that are bound already, the outputs in the order of their binding.
        """
        for name in segment.inputs:
            value = values.get(name)
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            elif name not in fixed:
                binding.bind_ortvalue_input(name, value)
        changing = [name for name in segment.outputs if name not in fixed]
        for name in changing:
            # The shape changes from run to run, so each is bound anew. Shapes and masks are computed on the CPU.
            floats = segment.outputs[name] in _FLOATS
            binding.bind_output(name, *self.device.split(":") if floats and self.device != "cpu" else ("cpu",))
        try:
            segment.session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own have no common base
            raise TargetError(f"ONNX Runtime could not run {segment.path.name} of the model ({error})") from error
        order = [*(name for name in fixed if name in segment.outputs), *changing]
        values |= zip(order, binding.get_outputs(), strict=True)
        assert self.group is not None
        for point in segment.points:
            if point.how == "sum":
                self.group.sum(values[point.tensor])
            else:
                values[point.tensor] = self.group.concat(values[point.tensor])
        for name in segment.last:
            values.pop(name, None)

    def steps(self, batch: int, length: int) -> SegmentSteps:
        return SegmentSteps(self, batch, length)


class SegmentSteps(Steps):
    """A decoder in segments, each with the part of the cache that its attention reads; see `OnnxRuntimeSteps`."""

    def __init__(self, segments: Segments, batch: int, length: int) -> None:
        self._segments = segments
        self._bindings: list[ort.IOBinding] = []
        self._fixed: list[dict[str, ort.OrtValue]] = []
        self._past: dict[str, ort.OrtValue] = {}  # of what no op appends to in place
        for segment in segments.segments:
            binding = segment.session.io_binding()
            fixed: dict[str, ort.OrtValue] = {}
            tensors = [tensor for tensor in segment.session.get_inputs() if tensor.name.startswith(PAST)]
            for tensor in tensors:
                cache = segment.cache
                assert cache is not None
                value = cache.empty(tensor, batch, length)
                if cache.in_place:
                    present = PRESENT + tensor.name.removeprefix(PAST)
                    binding.bind_ortvalue_input(tensor.name, value)
                    binding.bind_ortvalue_output(present, value)
                    fixed |= {tensor.name: value, present: value}
                else:
                    self._past[tensor.name] = value
            self._bindings.append(binding)
            self._fixed.append(fixed)
        if not self._past and not any(self._fixed):
            raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        own = self._segments
        feeds = step_feeds(input_ids, attention_mask, own.plan.inputs)
        values: Values = {**feeds, **self._past}
        for segment, binding, fixed in zip(own.segments, self._bindings, self._fixed, strict=True):
            own.advance(segment, values, binding, fixed)
        self._past = {name: values[PRESENT + name.removeprefix(PAST)] for name in self._past}
        return _array(values["logits"])


def _array(value: ort.OrtValue | np.ndarray) -> np.ndarray:
    found: np.ndarray = value if isinstance(value, np.ndarray) else value.numpy()
    return found
