"""TensorRT engines on the GPU of this machine, with numpy arrays in and out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from polygraphy import config as polygraphy_config
from polygraphy.exception import PolygraphyException

from trimtab.compiler.targets.segmented.segment import Values
from trimtab.compiler.targets.tensorrt.chain import Chain, Stage
from trimtab.compiler.targets.tensorrt.info import EngineFile, EngineInfo
from trimtab.passes.errors import TargetError

_TYPES = {
    "float": "FLOAT32", "half": "FLOAT16", "bf16": "BFLOAT16", "int32": "INT32", "int64": "INT64", "bool": "BOOL",
}  # fmt: skip
"""TensorRT's name of a type → Polygraphy's."""

_EMPTY_BYTES = 256  # size of the buffer of a tensor without elements: TensorRT needs an address


class TensorRTRunner(Chain):
    """Runs the engines of a build; it owns them, their execution contexts and buffers.

    Args:
        folder: folder of the engines.
        rtx: whether they are engines of TensorRT-RTX, not TensorRT. Polygraphy can use one of the two in a process.
    """

    def __init__(self, folder: Path, info: EngineInfo, *, rtx: bool) -> None:
        if "polygraphy.backend.trt" in sys.modules and rtx != polygraphy_config.USE_TENSORRT_RTX:
            raise TargetError(
                f"{folder}: this process already runs engines of {'TensorRT' if rtx else 'TensorRT-RTX'}",
                hint="open engines of the other library in a process of their own",
            )
        polygraphy_config.USE_TENSORRT_RTX = rtx
        stages = [EngineStage.load(folder, engine, info.weight_streaming) for engine in info.engines]
        super().__init__(stages, info.inputs, info.outputs, hook=None if info.exits is None else info.exits.hook())


class EngineStage(Stage):
    """An engine with an execution context and outputs of its own."""

    def __init__(self, info: EngineFile, engine: Any, streaming: bool) -> None:
        from polygraphy.backend.trt import TrtRunner

        super().__init__(info)
        self._engine, self._streaming, self._profile = engine, streaming, 0
        self._buffers: list[Any] = []
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

    def infer(self, feeds: Values, profile: int) -> Values:
        try:
            if profile != self._profile:
                self._runner.set_profile(profile)
                self._profile = profile
            arrays = {name: _bits(value) for name, value in feeds.items()}
            outputs: Values = self._runner.infer(arrays, check_inputs=False, copy_outputs_to_host=False)
        except PolygraphyException as error:
            raise TargetError(
                f"TensorRT could not run the engine ({error})", hint="sizes must be within the recipe's workload"
            ) from error
        return outputs

    def host(self, value: Any) -> np.ndarray:
        if isinstance(value, np.ndarray):
            return np.array(value)
        from polygraphy.cuda import DeviceView
        from polygraphy.datatype import DataType

        # numpy does not know bfloat16, so its bits are copied; `value.dtype` would print a warning.
        if value._dtype == DataType.BFLOAT16:
            bits = DeviceView(value.ptr, value.shape, DataType.INT16).numpy()
            return np.asarray(bits).view(ml_dtypes.bfloat16)
        return np.asarray(value.numpy())

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        from polygraphy.cuda import DeviceArray, DeviceView
        from polygraphy.datatype import DataType

        self._buffers.append(DeviceArray.raw((_EMPTY_BYTES,)))
        return DeviceView(self._buffers[-1].ptr, shape, getattr(DataType, _TYPES[dtype]))

    def close(self) -> None:
        if not self._runner.is_active:
            return
        outputs = self._runner.output_allocator.buffers  # the runner drops them without freeing them
        for buffer in (*self._buffers, *outputs.values()):
            buffer.free()
        self._buffers, self._runner.output_allocator.buffers = [], {}
        self._runner.deactivate()


def _bits(value: Any) -> Any:
    """A bfloat16 array as integers of its bits, since Polygraphy cannot copy bfloat16 to the device."""
    bfloat16 = isinstance(value, np.ndarray) and value.dtype == ml_dtypes.bfloat16
    return value.view(np.int16) if bfloat16 else value


__all__ = ["EngineStage", "TensorRTRunner"]
