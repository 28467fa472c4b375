"""Targets: the runtimes for which a graph is compiled."""

from __future__ import annotations

from trimtab.compiler.targets.base import Runner, Target
from trimtab.passes.errors import TargetError
from trimtab.passes.registry import import_named

_TARGETS = {
    "onnxruntime": "trimtab.compiler.targets.onnxruntime:OnnxRuntime",
    "tensorrt-rtx": "trimtab.compiler.targets.tensorrt.target:TensorRTRTX",
    "tensorrt": "trimtab.compiler.targets.tensorrt.target:TensorRT",
}
"""Name → module and class of the target; imported on first use."""

TARGET_NAMES = tuple(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`. Its `probe()` reports whether it can be used here.

    Raises:
        TargetError: no such target; names the nearest.
    """
    target_class: type[Target] = import_named(name, _TARGETS, "target", "targets", TargetError)
    return target_class()


__all__ = ["TARGET_NAMES", "Runner", "Target", "get_target"]
