"""TensorRT engines on the GPU of this machine, with numpy arrays in and out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy import config as polygraphy_config
from polygraphy.exception import PolygraphyException

from trimtab.compiler.targets.tensorrt.chain import Chain, Stage, Values
from trimtab.compiler.targets.tensorrt.info import EngineFile, EngineInfo
from trimtab.passes.errors import TargetError

_TYPES = {"float": np.float32, "half": np.float16, "int32": np.int32, "int64": np.int64, "bool": np.bool_}
_LEAST = 256  # bytes of a buffer that stands for a tensor without elements: TensorRT wants an address


class TensorRTRunner(Chain):
    """Holds the engines, their execution contexts and buffers until it is dropped.

    Args:
        folder: of the engines.
        rtx: of TensorRT-RTX rather than TensorRT. Polygraphy can use only one of the two in a process.
    """

    def __init__(self, folder: Path, info: EngineInfo, *, rtx: bool) -> None:
        if "polygraphy.backend.trt" in sys.modules and rtx != polygraphy_config.USE_TENSORRT_RTX:
            raise TargetError(
                f"{folder}: this process already runs engines of {'TensorRT' if rtx else 'TensorRT-RTX'}",
                hint="open engines of the other library in a process of their own",
            )
        polygraphy_config.USE_TENSORRT_RTX = rtx
        stages = [EngineStage.load(folder, engine, info.weight_streaming) for engine in info.engines]
        made = {tensor.name for engine in info.engines for tensor in engine.outputs}
        read = {tensor.name for engine in info.engines for tensor in engine.inputs}
        inputs = dict.fromkeys(t.name for engine in info.engines for t in engine.inputs if t.name not in made)
        outputs = [t.name for engine in info.engines for t in engine.outputs if t.name not in read]
        super().__init__(stages, list(inputs), outputs)


class EngineStage(Stage):
    """An engine with an execution context and outputs of its own."""

    def __init__(self, info: EngineFile, engine: Any, streaming: bool) -> None:
        from polygraphy.backend.trt import TrtRunner

        super().__init__(info)
        self._engine, self._streaming, self._profile = engine, streaming, 0
        self._runner = TrtRunner(engine, weight_streaming_budget=-1 if streaming else None)
        self._runner.activate()

    @classmethod
    def load(cls, folder: Path, info: EngineFile, streaming: bool) -> EngineStage:
        from polygraphy.backend.trt import EngineFromBytes

        path = folder / info.file
        try:
            return cls(info, EngineFromBytes(path.read_bytes())(), streaming)
        except (PolygraphyException, OSError) as error:
            raise TargetError(
                f"{path}: TensorRT cannot load this engine ({error})",
                hint="build it again with this TensorRT version, for this GPU; libcudart.so must be on LD_LIBRARY_PATH",
            ) from error

    def fork(self) -> EngineStage:
        return EngineStage(self.info, self._engine, self._streaming)

    def run(self, feeds: Values, profile: int) -> Values:
        try:
            if profile != self._profile:
                self._runner.set_profile(profile)
                self._profile = profile
            found: Values = self._runner.infer(feeds, check_inputs=False, copy_outputs_to_host=False)
        except PolygraphyException as error:
            raise TargetError(
                f"TensorRT could not run the engine ({error})", hint="sizes must lie within the recipe's workload"
            ) from error
        return found

    def host(self, value: Any) -> np.ndarray:
        return np.array(value) if isinstance(value, np.ndarray) else np.asarray(value.numpy())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        from polygraphy.cuda import DeviceArray, DeviceView
        from polygraphy.datatype import DataType

        room = DeviceArray.raw((_LEAST,))
        view = DeviceView(room.ptr, shape, DataType.from_dtype(np.dtype(_TYPES[dtype])))
        view.room = room  # lives as long as the view
        return view

    def close(self) -> None:
        self._runner.deactivate()


__all__ = ["EngineStage", "TensorRTRunner"]
