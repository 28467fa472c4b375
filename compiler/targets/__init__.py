"""Targets: the runtimes that a compiled graph is made for."""

from __future__ import annotations

from trimtab.compiler.targets.base import Runner, Target
from trimtab.passes.errors import TargetError
from trimtab.passes.registry import import_named

_TARGETS = {
    "onnxruntime": "trimtab.compiler.targets.onnxruntime:OnnxRuntime",
    "tensorrt-rtx": "trimtab.compiler.targets.tensorrt.target:TensorRTRTX",
    "tensorrt": "trimtab.compiler.targets.tensorrt.target:TensorRT",
}
"""Name → where its class is; imported when asked for."""

TARGET_NAMES = tuple(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`. Whether it can be used here, its `probe()` tells.

    Raises:
        TargetError: there is none; names the nearest.
    """
    found: type[Target] = import_named(name, _TARGETS, "target", "targets", TargetError)
    return found()


__all__ = ["TARGET_NAMES", "Runner", "Target", "get_target"]
