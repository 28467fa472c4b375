"""Targets: the runtimes that a compiled graph is made for."""

from __future__ import annotations

import difflib
from importlib import import_module

from trimtab.compiler.targets.base import Runner, Target
from trimtab.passes.errors import TargetError

_TARGETS = {
    "onnxruntime": "trimtab.compiler.targets.onnxruntime:OnnxRuntime",
    "tensorrt-rtx": "trimtab.compiler.targets.tensorrt:TensorRTRTX",
    "tensorrt": "trimtab.compiler.targets.tensorrt:TensorRT",
}
"""Name → where its class is; imported when asked for."""

TARGET_NAMES = tuple(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`. Whether it can be used here, its `probe()` tells.

    Raises:
        TargetError: there is none; names the nearest.
    """
    if name not in _TARGETS:
        near = difflib.get_close_matches(name, TARGET_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known targets: {', '.join(TARGET_NAMES)}"
        raise TargetError(f"unknown target {name!r}", hint=hint)
    module, attribute = _TARGETS[name].split(":")
    found: type[Target] = getattr(import_module(module), attribute)
    return found()


__all__ = ["TARGET_NAMES", "Runner", "Target", "get_target"]
