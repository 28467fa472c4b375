"""The pass `weight-only`: integer weights in blocks for the projections that other passes leave dense."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import constant, insert, replace_uses
from trimtab.passes.graph.linear import Linear
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.matrices.quantize import fit_block, round_to_nearest

_OPSET = 21  # in which DequantizeLinear takes blocks

Part = Literal["attention", "ffn", "head"]


class WeightOnly(Pass):
    """Store weights as symmetric integers with a scale per block, and compute in floating point as before.

    A step of a decoder is bound by the bytes of its weights, of which this leaves a quarter or an eighth. It stands
    behind passes that need weights in floating point, and takes what they have left.
    """

    name: ClassVar[str] = "weight-only"
    summary: ClassVar[str] = "int8 or int4 weights in blocks for attention, FFNs or head, activations in float"

    bits: Literal[8, 4] = Field(8, description="of a weight", json_schema_extra={"search": [8, 4]})
    block: int = Field(32, ge=16, le=256, description="inputs that share a scale, at most")
    parts: tuple[Part, ...] = Field(("attention", "ffn", "head"), description="projections to quantize")

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Quantize the projections of `graph`. Reads their weights, one at a time."""
        reason = self.unfit(context.capability)
        if reason is not None:
            raise RecipeError(f"the target cannot run it: {reason}")
        raise_opset(graph, _OPSET)
        anatomy = find_anatomy(graph)
        left: list[Left] = []
        before = after = changed = ffn_bytes = 0
        for part, where, linear in self._linears(anatomy):
            size = fit_block(self.block, linear.in_features)
            floats = linear.quantized is None and np.dtype(linear.weight.dtype) == np.float32
            reason = None if floats else "its weights are not float32"
            if floats and size is None:
                reason = f"no block of 16 or more divides its {linear.in_features} inputs"
            if reason is not None or size is None:
                left.append(Left(where, reason or ""))
                ffn_bytes += linear.bytes if part == "ffn" else 0
                continue
            name = f"{self.name}/{where.replace(' ', '.')}"
            matrix = round_to_nearest(linear.w().astype(np.float32), self.bits, size)
            y = matrix.emit(graph, linear.x, name, np.dtype(np.float32))
            bias = linear.b()
            if bias is not None:
                y = insert(graph, "Add", [y, constant(f"{name}.bias", bias)], f"{name}/shift", dtype=np.float32)
            y.shape = linear.y.shape
            before, after, changed = before + linear.bytes, after + matrix.nbytes, changed + 1
            ffn_bytes += matrix.nbytes if part == "ffn" else 0
            replace_uses(graph, linear.y, y)
            if context.progress is not None:
                context.progress("quantize weights", changed, changed)
        details: dict[str, Any] = {"dense_bytes": before, "bytes": after}
        if "ffn" in self.parts and ffn_bytes:
            details["ffn_bytes"] = ffn_bytes
        return PassResult(self.name, changed, tuple(left), details)

    def unfit(self, capability: Capability) -> str | None:
        if self.bits in capability.weight_bits:
            return None
        can = ", ".join(f"int{bits}" for bits in sorted(capability.weight_bits)) or "no integer weights"
        return f"it does not multiply with int{self.bits} weights, but with {can}"

    def _linears(self, anatomy: Anatomy) -> Iterator[tuple[Part, str, Linear]]:
        """(part, what it is called, projection), each projection once."""
        if "attention" in self.parts:
            for attention in anatomy.attentions:
                for number, linear in enumerate(attention.linears):
                    yield "attention", f"layer {attention.layer} attention {number}", linear
        if "ffn" in self.parts:
            for ffn in anatomy.ffns:
                for number, linear in enumerate(ffn.linears):
                    yield "ffn", f"{ffn.where} {number}", linear
        if "head" in self.parts and anatomy.head is not None:
            for number, linear in enumerate(anatomy.head.linears):
                yield "head", f"head {number}", linear
