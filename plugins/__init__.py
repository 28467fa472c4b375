"""The dialect: the few ops that ONNX lacks, one folder per op.

An op's folder holds its declaration, its reference body in standard ONNX ops, and its kernels; one op is one kernel
launch. A folder `keep_tokens` declares `KEEP_TOKENS`, and that is all there is to registering it.
"""

from __future__ import annotations

import pkgutil
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import onnx

from trimtab.plugins.dialect import DOMAIN, Op
from trimtab.plugins.emit import add_multi_output_node, add_node

_SHARED = {"gpu", "lowering", "tensorrt"}
"""Packages that are not ops, but shared by ops."""

FOLDERS: dict[str, str] = {}
"""Name of an op → name of its folder."""

OPS: dict[str, Op] = {}
"""Name → op."""

for _package in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if _package.ispkg and _package.name not in _SHARED:
        _op: Op = getattr(import_module(f"{__name__}.{_package.name}"), _package.name.upper())
        OPS[_op.name], FOLDERS[_op.name] = _op, _package.name

__all__ = ["DOMAIN", "FOLDERS", "OPS", "Op", "add_multi_output_node", "add_node", "redeclared", "register_schemas"]


def redeclared(model: onnx.ModelProto) -> str | None:
    """The name of an op that had other inputs, outputs or attributes when `model` was compiled; None if no op had.

    A model carries the bodies of its ops, whose signatures are those of that time.
    """
    for function in model.functions:
        op = OPS.get(function.name) if function.domain == DOMAIN else None
        if op is None:
            continue
        then = (function.input, function.output, function.attribute)
        now = (op.inputs, op.outputs, op.attributes)
        if [list(names) for names in then] != [[part.name for part in parts] for parts in now]:
            return op.name
    return None


@lru_cache
def register_schemas() -> None:
    """Register the ops with ONNX for this process. ONNX then infers shapes by the ops' rules instead of their bodies.

    Of a body with sizes that hang on data it infers nothing, and of all that reads it neither.
    """
    for op in OPS.values():
        onnx.defs.register_schema(op.schema())


def __getattr__(name: str) -> Op:
    """Import an op by the name of its constant: `from trimtab.plugins import SELECT_BLOCKS`."""
    for op, folder in FOLDERS.items():
        if folder.upper() == name:
            return OPS[op]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
