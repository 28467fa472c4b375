"""The pass `static-int8`: int8 products of FFNs, with scales of activations from calibration (for TensorRT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import FFN, find_anatomy, select_ffns
from trimtab.passes.anatomy.rewritten import Rewritten, find_rewritten
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.graph import constant, insert, replace_uses, stored_bytes
from trimtab.passes.graph.linear import Linear, distinct_bytes
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.graph.part import nodes_between, run_part
from trimtab.passes.needs import FFNStates, Need
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import sample_ffn

_OPSET = 19  # the first opset whose QuantizeLinear takes half precision too
_LARGEST = 127


class StaticInt8(Pass):
    """Round the FFNs' inputs, activations and weights to int8, with pairs of QuantizeLinear and DequantizeLinear.

    Each tensor of activations has one scale, computed from the Profile's states; each weight has one scale per output.
    If another pass has rewritten an FFN, its new nodes run on the Profile's states, so that every product's input has a
    scale. Layers that share weights share their integers; each layer has its own activation scales.
    TensorRT and ONNX Runtime turn the pairs into integer products. Attention is not rounded, because the Profile has no
    statistics of it.
    Exact end: layers=() rounds nothing.
    """

    name: ClassVar[str] = "static-int8"
    summary: ClassVar[str] = "int8 products of FFNs, with scales of activations from calibration (TensorRT)"
    leaves_experts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})

    coverage: float = Field(
        0.9999, gt=0.9, le=1, description="share of the activations that is not clipped",
    )  # fmt: skip
    layers: tuple[int, ...] | None = Field(None, description="these FFNs alone, counted from 0")

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize the FFNs of `graph`. Reads states of each from the Profile."""
        anatomy = find_anatomy(graph)
        profile = context.measured()
        rewritten = {ffn.layer: ffn for ffn in find_rewritten(graph, anatomy)}
        layers = None if self.layers is None else set(self.layers) - rewritten.keys()
        ffns: list[FFN | Rewritten] = [*select_ffns(anatomy, layers)]
        ffns += [ffn for ffn in rewritten.values() if self.layers is None or ffn.layer in self.layers]
        everything: list[FFN | Rewritten] = [*anatomy.ffns, *rewritten.values()]
        linears = {ffn.layer: ffn.linears for ffn in everything}
        raise_opset(graph, _OPSET)
        left: list[Left] = []
        rows: list[dict[str, Any]] = []
        weights = _Weights(graph)
        for ffn in sorted(ffns, key=lambda ffn: ffn.layer):
            reason = _unfit(ffn) or (_unknown(ffn, profile) if isinstance(ffn, Rewritten) else None)
            if reason is not None:
                left.append(Left(ffn.where, reason))
                continue
            rows.append({"layer": ffn.layer} | self._round(graph, ffn, _inputs(graph, ffn, profile), weights))
            if context.progress is not None:
                context.progress("quantize", len(rows), len(ffns))
        rounded = {row["layer"] for row in rows}
        untouched = [linear for layer, own in linears.items() if layer not in rounded for linear in own]
        total = distinct_bytes(untouched) + weights.nbytes
        return PassResult(self.name, len(rows), tuple(left), {"layers": rows, "ffn_bytes": total})

    def _round(
        self, graph: gs.Graph, ffn: FFN | Rewritten, inputs: Sequence[np.ndarray], weights: _Weights
    ) -> dict[str, float]:
        """Round the projections of `ffn`; returns the input scales of the first and the last projection.

        Args:
            inputs: sampled inputs of each projection.
        """
        name, labels = f"{self.name}/layer.{ffn.layer}", _labels(ffn)
        read: dict[int, gs.Variable] = {}
        scales: list[float] = []
        for label, linear, activations in zip(labels, ffn.linears, inputs, strict=True):
            scales.append(self._scale(activations))
            if id(linear.x) not in read:
                at = "x" if not read else "h" if label == labels[-1] else f"{label}/x"
                read[id(linear.x)] = _rounded(graph, linear.x, scales[-1], f"{name}/{at}")
            weights.multiply(linear, read[id(linear.x)], f"{name}/{label}")
        return {"x_scale": scales[0], "h_scale": scales[-1]}

    def _scale(self, activations: np.ndarray) -> float:
        largest = float(np.quantile(np.abs(activations), self.coverage))
        return max(largest, 1e-6) / _LARGEST


def _unfit(ffn: FFN | Rewritten) -> str | None:
    """Why this FFN stays as it is, or None."""
    if isinstance(ffn, Rewritten) and ffn.ops:
        return f"it is computed by {', '.join(sorted(set(ffn.ops)))}, which have weights of their own"
    if any(linear.quantized is not None for linear in ffn.linears):
        return "its weights are quantized already"
    if any(np.dtype(linear.weight.dtype) != np.float32 for linear in ffn.linears):
        return "its weights are not float32"
    return None


def _unknown(ffn: Rewritten, profile: Profile) -> str | None:
    """Why the inputs of `ffn`'s projections cannot be computed from the Profile, or None."""
    states = profile.states(ffn.layer)
    if not len(states) or states.shape[1] != ffn.linears[0].in_features:
        return "the profile has no states of it"
    for node in nodes_between([ffn.x], [linear.x for linear in ffn.linears]):
        if any(not (t.inputs or t is ffn.x or isinstance(t, gs.Constant) or t.is_empty()) for t in node.inputs):
            return "its projections read more than its input"
    return None


def _labels(ffn: FFN | Rewritten) -> list[str]:
    """Names of the projections, for nodes and constants."""
    if isinstance(ffn, FFN):
        return ["gate", "up", "down"] if ffn.gated else ["up", "down"]
    return [f"product.{number}" for number in range(len(ffn.linears))]


def _inputs(graph: gs.Graph, ffn: FFN | Rewritten, profile: Profile) -> list[np.ndarray]:
    """Inputs of each projection of `ffn` on the Profile's states of the dense FFN."""
    if isinstance(ffn, FFN):
        layer = sample_ffn(ffn, profile)
        return [layer.fit] * (len(ffn.linears) - 1) + [layer.h_fit]
    states = profile.states(ffn.layer)
    if len(ffn.x.shape or ()) == 3:
        states = states[None]
    later = list({id(linear.x): linear.x for linear in ffn.linears if linear.x is not ffn.x}.values())
    values = run_part(graph, [ffn.x], later, {ffn.x.name: states}) if later else []
    activations = {id(ffn.x): states} | {id(tensor): value for tensor, value in zip(later, values, strict=True)}
    return [activations[id(linear.x)] for linear in ffn.linears]


def _rounded(graph: gs.Graph, x: gs.Tensor, scale: float, name: str) -> gs.Variable:
    """`x` rounded to int8, as float32."""
    parts = constant(f"{name}.scale", np.array(scale, np.float32)), constant(f"{name}.zero", np.array(0, np.int8))
    q = insert(graph, "QuantizeLinear", [x, *parts], f"{name}/q", dtype=np.int8)
    return insert(graph, "DequantizeLinear", [q, *parts], f"{name}/dq", dtype=np.float32)


class _Weights:
    """Rounded weights. Projections that share a weight share its rounded form."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._matrices: dict[tuple[int, bool], list[gs.Constant]] = {}
        self._biases: dict[int, gs.Constant] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the rounded weights, their scales and the biases."""
        rounded = [part for parts in self._matrices.values() for part in parts]
        return sum(stored_bytes(part) for part in (*rounded, *self._biases.values()))

    def multiply(self, linear: Linear, x: gs.Tensor, name: str) -> None:
        """Replace `linear` by the product of `x` with its rounded weights."""
        key = id(linear.weight), linear.transposed
        if key not in self._matrices:
            w = linear.w().astype(np.float32)
            scale = np.maximum(np.abs(w).max(0), 1e-12).astype(np.float32) / _LARGEST
            q = np.clip(np.rint(w / scale), -_LARGEST, _LARGEST).astype(np.int8)
            self._matrices[key] = [constant(f"{name}.weight", q), constant(f"{name}.scale", scale)]
        graph, attrs = self.graph, dict[str, object](axis=1)
        weight = insert(
            graph, "DequantizeLinear", [*self._matrices[key]], f"{name}/weight", attrs=attrs, dtype=np.float32
        )
        y = insert(graph, "MatMul", [x, weight], name, dtype=np.float32)
        if linear.bias is not None:
            self._biases[id(linear.bias)] = linear.bias
            y = insert(graph, "Add", [y, linear.bias], f"{name}/shift", dtype=np.float32)
        y.shape = linear.y.shape
        replace_uses(graph, linear.y, y)
