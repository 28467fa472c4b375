"""Joins the projections to q, k and v into one product."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.linear import Linear
from trimtab.passes.unpad.core import Core

__all__ = ["join_projections"]


def join_projections(graph: gs.Graph, core: Core, replaced: Mapping[int, gs.Tensor]) -> dict[str, gs.Tensor]:
    """The inputs q, k and v of a PackedAttention, or only q, a tensor with all three.

    Three products of one tensor with float weights become one, which reads the tensor once; as an integer product, it
    also rounds the tensor only once.

    Args:
        replaced: id of a tensor → its replacement.
    """
    attention = core.attention
    linears = [linear for linear in (attention.q, attention.k, attention.v) if linear is not None]
    if len(core.sources) == 1:
        return {"q": core.sources[0]}
    x = linears[0].x
    if any(linear.x is not x or not _plain(linear) for linear in linears):
        return dict(zip("qkv", core.sources, strict=True))
    name = f"unpad/attention.{attention.layer}/qkv"
    weight = constant(f"{name}.weight", np.concatenate([linear.w() for linear in linears], axis=1))
    y = insert(graph, "MatMul", [replaced.get(id(x), x), weight], name, dtype=x.dtype or np.float32)
    y.shape = ["unpad.real", weight.shape[1]]
    biases = [linear.b() for linear in linears]
    if any(b is not None for b in biases):
        whole = [
            np.zeros(linear.out_features, np.float32) if b is None else b
            for linear, b in zip(linears, biases, strict=True)
        ]
        bias = constant(f"{name}.bias", np.concatenate(whole))
        y = insert(graph, "Add", [y, bias], f"{name}/y", dtype=y.dtype)
        y.shape = ["unpad.real", weight.shape[1]]
    return {"q": y}


def _plain(linear: Linear) -> bool:
    """Whether the weight is a float32 constant, and the product has a single reader."""
    outputs = linear.y.outputs
    return linear.quantized is None and linear.weight.dtype == np.float32 and len(outputs) == 1
