"""Run a TensorRT engine on the GPU of this machine, with numpy arrays in and out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from polygraphy import config as polygraphy_config
from polygraphy.exception import PolygraphyException

from trimtab.compiler.targets.base import Runner
from trimtab.passes.errors import TargetError


class TensorRTRunner(Runner):
    """Holds the engine, its execution context and its buffers until it is dropped.

    Args:
        engine: the serialized engine.
        rtx: of TensorRT-RTX rather than TensorRT. Polygraphy can use only one of the two in a process.
    """

    def __init__(self, engine: Path, *, rtx: bool) -> None:
        if "polygraphy.backend.trt" in sys.modules and rtx != polygraphy_config.USE_TENSORRT_RTX:
            raise TargetError(
                f"{engine}: this process already runs engines of {'TensorRT' if rtx else 'TensorRT-RTX'}",
                hint="open engines of the other library in a process of their own",
            )
        polygraphy_config.USE_TENSORRT_RTX = rtx
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        try:
            self._runner = TrtRunner(EngineFromBytes(engine.read_bytes()))
            self._runner.activate()
        except (PolygraphyException, OSError) as error:
            raise TargetError(
                f"{engine}: TensorRT cannot load this engine ({error})",
                hint="build it again with this TensorRT version, for this GPU; libcudart.so must be on LD_LIBRARY_PATH",
            ) from error
        names = [self._runner.engine.get_tensor_name(i) for i in range(self._runner.engine.num_io_tensors)]
        fed = self._runner.get_input_metadata()
        self.inputs = tuple(name for name in names if name in fed)
        self.outputs = tuple(name for name in names if name not in fed)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = self._runner.infer(dict(inputs), check_inputs=True)
        except PolygraphyException as error:
            raise TargetError(
                f"TensorRT could not run the engine ({error})", hint="sizes must lie within the recipe's workload"
            ) from error
        return {name: np.array(found[name]) for name in self.outputs}  # the runner uses its buffers again
