"""ONNX Runtime's sessions that stand in for engines of TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from rewrite import session

from trimtab.compiler.targets.segmented.segment import Values
from trimtab.compiler.targets.tensorrt.chain import Stage
from trimtab.compiler.targets.tensorrt.info import EngineFile, ProfileInfo, Tensor


class StandIn(Stage):
    """A session whose outputs go when it runs again, as an engine's do."""

    def __init__(self, info: EngineFile, run: ort.InferenceSession, used: list[int]) -> None:
        super().__init__(info)
        self.session, self.used = run, used
        self.last: list[np.ndarray] = []
        self.forks: list[StandIn] = []
        self.closed = False

    def infer(self, given: Values, profile: int) -> Values:
        self.used.append(profile)
        for array in self.last:  # first: an engine reads its inputs while it writes its outputs
            array[...] = -99 if array.dtype.kind in "iu" else False if array.dtype == bool else np.nan
        found = [np.array(array) for array in self.session.run(None, given)]
        self.last = found
        return dict(zip((t.name for t in self.session.get_outputs()), found, strict=True))

    def fork(self) -> StandIn:
        self.forks.append(StandIn(self.info, self.session, self.used))
        return self.forks[-1]

    def close(self) -> None:
        self.closed = True

    def host(self, value: Any) -> np.ndarray:
        return np.array(value)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        assert dtype == "float"
        return np.zeros(shape, np.float32)


def stand_in(path: Path, profiles: dict[str, Any], used: list[int]) -> StandIn:
    """A stand-in for the engine of the ONNX file `path`; profile → its shapes."""
    run = session(path)
    inputs, outputs = (
        tuple(
            Tensor(name=t.name, dtype="float", shape=[n if isinstance(n, int) else -1 for n in t.shape]) for t in side
        )
        for side in (run.get_inputs(), run.get_outputs())
    )
    known = tuple(ProfileInfo(name=name, shapes=shapes) for name, shapes in profiles.items())
    return StandIn(EngineFile(file=path.name, inputs=inputs, outputs=outputs, profiles=known), run, used)
