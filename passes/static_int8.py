"""The pass `static-int8`: int8 products of FFNs, with scales of activations from calibration (for TensorRT)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import FFN, find_anatomy, select_ffns
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.graph import constant, insert, replace_uses, stored_bytes
from trimtab.passes.graph.linear import Linear, distinct_bytes
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.layer import read_layer
from trimtab.passes.needs import FFNStates, Need

_OPSET = 19  # in which QuantizeLinear takes half precision too
_LARGEST = 127


class StaticInt8(Pass):
    """Round the FFNs' inputs, activations and weights to int8, by pairs of QuantizeLinear and DequantizeLinear.

    A scale for each tensor of activations, which covers what the Profile holds, and one for each output of a weight.
    Layers that share weights share their integers, and have scales of activations of their own.
    TensorRT and ONNX Runtime make integer products of the pairs. Attention stays: the Profile knows FFNs alone.
    Exact end: layers=() rounds nothing.
    """

    name: ClassVar[str] = "static-int8"
    summary: ClassVar[str] = "int8 products of FFNs, with scales of activations from calibration (TensorRT)"
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})

    coverage: float = Field(
        0.9999, gt=0.9, le=1, description="share of the activations that is not clipped",
        json_schema_extra={"search": [0.999, 0.9999, 1.0]},
    )  # fmt: skip
    layers: tuple[int, ...] | None = Field(None, description="these FFNs alone, counted from 0")

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize the FFNs of `graph`. Reads states of each from the Profile."""
        anatomy = find_anatomy(graph)
        wanted = select_ffns(anatomy, self.layers)
        profile = context.measured()
        raise_opset(graph, _OPSET)
        left: list[Left] = []
        rows: list[dict[str, Any]] = []
        weights = _Weights(graph)
        for ffn in wanted:
            reason = _unfit(ffn)
            if reason is not None:
                left.append(Left(ffn.where, reason))
                continue
            layer = read_layer(ffn, profile)
            scales = [self._scale(values) for values in (layer.fit, layer.h_fit)]
            name = f"{self.name}/layer.{ffn.layer}"
            x = _rounded(graph, ffn.x, scales[0], f"{name}/x")
            for label, linear in zip(("gate", "up") if ffn.gated else ("up",), ffn.linears[:-1], strict=True):
                weights.multiply(linear, x, f"{name}/{label}")
            weights.multiply(ffn.down, _rounded(graph, ffn.hidden, scales[1], f"{name}/h"), f"{name}/down")
            rows.append({"layer": ffn.layer, "x_scale": scales[0], "h_scale": scales[1]})
            if context.progress is not None:
                context.progress("quantize", len(rows), len(wanted))
        rounded = {row["layer"] for row in rows}
        untouched = [linear for ffn in anatomy.ffns if ffn.layer not in rounded for linear in ffn.linears]
        total = distinct_bytes(untouched) + weights.nbytes
        return PassResult(self.name, len(rows), tuple(left), {"layers": rows, "ffn_bytes": total})

    def _scale(self, activations: np.ndarray) -> float:
        most = float(np.quantile(np.abs(activations), self.coverage))
        return max(most, 1e-6) / _LARGEST


def _unfit(ffn: FFN) -> str | None:
    """Why this FFN stays as it is, or None."""
    if any(linear.quantized is not None for linear in ffn.linears):
        return "its weights are quantized already"
    if any(np.dtype(linear.weight.dtype) != np.float32 for linear in ffn.linears):
        return "its weights are not float32"
    return None


def _rounded(graph: gs.Graph, x: gs.Tensor, scale: float, name: str) -> gs.Variable:
    """`x` as int8 holds it, in float32."""
    parts = constant(f"{name}.scale", np.array(scale, np.float32)), constant(f"{name}.zero", np.array(0, np.int8))
    q = insert(graph, "QuantizeLinear", [x, *parts], f"{name}/q", dtype=np.int8)
    return insert(graph, "DequantizeLinear", [q, *parts], f"{name}/dq", dtype=np.float32)


class _Weights:
    """Rounded weights, each made once for all projections that share it."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[int, bool], list[gs.Constant]] = {}
        self._biases: dict[int, gs.Constant] = {}

    @property
    def nbytes(self) -> int:
        """Of all that was made, and of the biases that go with it."""
        made = [part for parts in self._made.values() for part in parts]
        return sum(stored_bytes(part) for part in (*made, *self._biases.values()))

    def multiply(self, linear: Linear, x: gs.Tensor, name: str) -> None:
        """Multiply `x` with the rounded weights of `linear`, in its place."""
        key = id(linear.weight), linear.transposed
        if key not in self._made:
            w = linear.w().astype(np.float32)
            scale = np.maximum(np.abs(w).max(0), 1e-12).astype(np.float32) / _LARGEST
            q = np.clip(np.rint(w / scale), -_LARGEST, _LARGEST).astype(np.int8)
            self._made[key] = [constant(f"{name}.weight", q), constant(f"{name}.scale", scale)]
        graph, attrs = self.graph, dict[str, object](axis=1)
        weight = insert(graph, "DequantizeLinear", [*self._made[key]], f"{name}/weight", attrs=attrs, dtype=np.float32)
        y = insert(graph, "MatMul", [x, weight], name, dtype=np.float32)
        if linear.bias is not None:
            self._biases[id(linear.bias)] = linear.bias
            y = insert(graph, "Add", [y, linear.bias], f"{name}/shift", dtype=np.float32)
        y.shape = linear.y.shape
        replace_uses(graph, linear.y, y)
