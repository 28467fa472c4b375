"""Lowers ops of the dialect to standard ops, for targets without kernels or plugins for them.

An op's rule is in its folder's `lower.py`: `RULES`, op → rule. An op without one is left to its reference body. A rule
pays where TensorRT's parser cannot tell the sizes in the body, or where constants allow for less work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TypeAlias

import onnx_graphsurgeon as gs

from trimtab.plugins.dialect import Op
from trimtab.plugins.lowering.nodes import Nodes, Operand, Range, onnx_type, type_of
from trimtab.plugins.lowering.rows import Rows, Weight, like, product

__all__ = ["Nodes", "Operand", "Range", "Rows", "Rule", "Weight", "like", "onnx_type", "product", "rules", "type_of"]

Rule: TypeAlias = Callable[[Nodes, gs.Node, Mapping[str, gs.Tensor]], list[gs.Tensor]]
"""(what appends nodes, the node, its inputs by name) → the tensors that take the place of its outputs.

Raises ValueError, with the reason, where the node has no form in standard ops."""


@lru_cache
def rules() -> dict[str, tuple[Op, Rule]]:
    """Name of an op → the op, and its rule."""
    from trimtab.plugins import FOLDERS

    modules = [f"trimtab.plugins.{folder}.lower" for folder in FOLDERS.values()]
    tables = [importlib.import_module(name).RULES for name in modules if importlib.util.find_spec(name)]
    return {op.name: (op, rule) for table in tables for op, rule in table.items()}
