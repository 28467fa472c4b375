"""The pass `weight-only`: blockwise integer weights for the projections that other passes leave dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult
from trimtab.passes.crossover import DenseForm
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import insert, replace_uses, stored_bytes
from trimtab.passes.graph.linear import Linear, distinct_bytes
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.matrices.forms import OPSETS, Product
from trimtab.passes.matrices.quantize import fit_block, round_to_nearest
from trimtab.plugins.lowering import type_of

Part = Literal["attention", "ffn", "head"]

_COMPUTED = (np.float32, np.float16)
"""Types in which products with integer weights run, whatever type the weights are stored in."""


class WeightOnly(Pass):
    """Store weights as symmetric integers with a scale per block, and compute in floating point as before.

    A matrix that layers share is rounded and stored once.
    The bytes of the weights bound the speed of a decoder's step; this pass leaves a quarter or an eighth of them. It
    runs after the passes that need floating-point weights, and rounds the projections that they leave dense.
    """

    name: ClassVar[str] = "weight-only"
    summary: ClassVar[str] = "int8 or int4 weights in blocks for attention, FFNs or head, activations in float"
    leaves_experts: ClassVar[bool] = True

    bits: Literal[8, 4] = Field(8, description="of a weight")
    block: int = Field(32, ge=16, le=256, description="inputs that share a scale, at most")
    parts: tuple[Part, ...] = Field(("attention", "ffn", "head"), description="projections to quantize")

    def dense_form(self, part: Literal["ffn", "head"], capability: Capability) -> DenseForm | None:
        if part not in self.parts:
            return None
        return "int8-blocks" if self.bits == 8 else "int4-blocks"

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize the projections of `graph`. Reads their weights, one at a time."""
        reason = self.unfit(context.capability)
        if reason is not None:
            raise RecipeError(
                f"the target cannot run it: {reason}", hint="leave the pass out, or choose another target"
            )
        raise_opset(graph, OPSETS[f"int{self.bits}"])
        left: list[Left] = []
        selected: list[tuple[str, Linear, int]] = []
        anatomy = find_anatomy(graph)
        for where, linear in self._linears(anatomy):
            size = fit_block(self.block, linear.in_features)
            reason = _unfit(linear, size)
            if reason is None and size is not None:
                selected.append((where, linear, size))
                continue
            left.append(Left(where, reason or ""))
        uses = Counter(_matrix_of(linear) for _, linear, _ in selected)
        of_ffns = [linear for ffn in anatomy.ffns for linear in ffn.linears]
        of_ffns_too = {_matrix_of(linear) for linear in of_ffns}
        products: dict[tuple[int, bool, np.dtype], Product] = {}
        after = ffn_bytes = 0
        for done, (where, linear, size) in enumerate(selected, 1):
            name, key = f"{self.name}/{where.replace(' ', '.')}", _matrix_of(linear)
            if key not in products:
                by_largest = self.bits == 4 and context.capability.negative_scales
                matrix = round_to_nearest(linear.w().astype(np.float32), self.bits, size, by_largest=by_largest)
                products[key] = matrix.store(name, type_of(linear.x), uses[key])
                after += matrix.nbytes
                ffn_bytes += matrix.nbytes if key in of_ffns_too else 0
            y = products[key](graph, linear.x, name)
            if linear.bias is not None:
                y = insert(graph, "Add", [y, linear.bias], f"{name}/shift", dtype=type_of(linear.x))
            y.shape = linear.y.shape
            replace_uses(graph, linear.y, y)
            if context.progress is not None:
                context.progress("quantize weights", done, len(selected))
        graph.cleanup(remove_unused_graph_inputs=False)
        weights = {id(linear.weight): linear.weight for _, linear, _ in selected}
        in_use = {id(tensor) for tensor in graph.tensors().values()}
        kept = sum(stored_bytes(weight) for weight in weights.values() if id(weight) in in_use)
        details: dict[str, Any] = {"dense_bytes": sum(map(stored_bytes, weights.values())), "bytes": after}
        if kept:  # such as an embedding table that the head is tied to
            details["float_bytes_kept"] = kept
        if "ffn" in self.parts and of_ffns:
            gone = weights.keys() - in_use
            details["ffn_bytes"] = (
                ffn_bytes
                + distinct_bytes(of_ffns)
                - sum(
                    stored_bytes(w) for w in {id(m.weight): m.weight for m in of_ffns if id(m.weight) in gone}.values()
                )
            )
        return PassResult(self.name, len(selected), tuple(left), details)

    def unfit(self, capability: Capability) -> str | None:
        if self.bits in capability.weight_bits:
            return None
        can = ", ".join(f"int{bits}" for bits in sorted(capability.weight_bits)) or "no integer weights"
        return f"it does not multiply with int{self.bits} weights, but with {can}"

    def _linears(self, anatomy: Anatomy) -> Iterator[tuple[str, Linear]]:
        """(name, projection) of each projection to quantize."""
        if "attention" in self.parts:
            for attention in anatomy.attentions:
                for number, linear in enumerate(attention.linears):
                    yield f"layer {attention.layer} attention {number}", linear
        if "ffn" in self.parts:
            for ffn in anatomy.ffns:
                for number, linear in enumerate(ffn.linears):
                    yield f"{ffn.where} {number}", linear
        if "head" in self.parts and anatomy.head is not None:
            for number, linear in enumerate(anatomy.head.linears):
                yield f"head {number}", linear


def _matrix_of(linear: Linear) -> tuple[int, bool, np.dtype]:
    """Key of a projection's matrix and type: projections with the same key share a rounded matrix."""
    return id(linear.weight), linear.transposed, type_of(linear.x)


def _unfit(linear: Linear, block: int | None) -> str | None:
    """Why this projection stays as it is, or None."""
    if linear.quantized is not None:
        return "its weights are quantized already"
    if type_of(linear.x) not in _COMPUTED:
        return f"it computes in {type_of(linear.x).name}"
    return None if block else f"no block of 16 or more divides its {linear.in_features} inputs"
