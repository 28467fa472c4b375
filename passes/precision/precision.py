"""The pass `precision`: half-precision activations and weights as types in the graph, which the runtime follows."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Literal

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import Field

from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.contract import Left, Pass, PassContext, PassResult
from trimtab.passes.graph import constant, insert, output_name_of, rename_output, topological, values
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.precision.masks import MASK, bound, reaches_far, saturated
from trimtab.passes.precision.norms import fuse_norms
from trimtab.passes.precision.regions import Regions, divide
from trimtab.passes.precision.tensors import QUANTIZERS, has_subgraphs, is_float, is_integer
from trimtab.plugins import DOMAIN, OPS
from trimtab.plugins.dialect import Form
from trimtab.plugins.emit import add_body, type_of

_TYPES: dict[str, np.dtype] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_OPSETS = {"float16": 19, "bfloat16": 22}
"""Opsets from which QuantizeLinear supports half precision, and nearly every op supports bfloat16."""
_FLOAT = np.dtype(np.float32)


class Precision(Pass):
    """Compute in half precision where float32 is not needed; inputs and outputs keep their types unless `io` is set.

    TensorRT takes precision from the graph, and GPUs multiply at least twice as fast in half precision; CPUs rarely do.
    The pass comes after those that need weights in float32.
    Exact end: type=float32.
    """

    name: ClassVar[str] = "precision"
    summary: ClassVar[str] = "float16 or bfloat16 in the graph, float32 where sums and ranges need it"

    type: Literal["float32", "float16", "bfloat16"] = Field("float16", description="type of activations and weights")
    io: bool = Field(False, description="convert inputs and outputs, too, such as a decoder's cache and logits")
    keep: tuple[str, ...] = Field((), description="further ops, by their ONNX names, that stay in float32")

    def bars(self, later: Pass) -> str | None:
        if self.type == "float32" or not (later.reads_layers or later.name in ("precision", "dynamic-int8")):
            return None
        return f"after it, the graph has {self.type} tensors"

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Retype `graph`. Reads its weights, one at a time."""
        if self.type == "float32":
            return PassResult(self.name, 0)
        raise_opset(graph, _OPSETS[self.type])
        infer_shapes(graph)
        fuse_norms(graph, self.keep)
        dtype = _TYPES[self.type]
        # On CPUs, the dialect's kernels only support float32.
        regions = divide(graph, dtype, self.keep, dialect=context.capability.float16)
        typing = _Typing(graph, dtype, regions, self.io)
        typing.run()
        if any(node.domain == DOMAIN for node in regions.half):
            _renew_bodies(graph)
        details: dict[str, Any] = {
            "type": self.type, "casts": typing.casts, "kept": len(regions.kept),
            "why": dict(sorted(Counter(regions.kept.values()).items())),
            "ops": dict(sorted(Counter(node.op for node in regions.half).items())),
        }  # fmt: skip
        why = f"decides in float32 by values rounded to {self.type}: near ties may have another outcome"
        left = tuple(Left(output_name_of(node), why) for node in regions.deciding)
        return PassResult(self.name, len(regions.half), left, details)


class _Typing:
    """Gives the half-precision nodes of `regions` the type `dtype`, with casts between them and other nodes.

    Attributes:
        casts: the number of new casts.
    """

    def __init__(self, graph: gs.Graph, dtype: np.dtype, regions: Regions, io: bool) -> None:
        self.graph, self.dtype, self.io, self.casts = graph, dtype, io, 0
        self.half, self._masks = {id(node) for node in regions.half}, regions.masks
        self._onnx = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        self._made: dict[tuple[int, bool], gs.Tensor] = {}
        self._in_half: set[int] = set()  # tensors that have become half

    def run(self) -> None:
        graph = self.graph
        if self.io:
            for tensor in graph.inputs:
                if is_float(tensor):
                    self._retype(tensor)
        for node in topological(graph):
            if has_subgraphs(node):
                continue  # its inputs are unchanged
            is_half = id(node) in self.half
            if is_half and node.op in QUANTIZERS and isinstance(node.inputs[1], gs.Constant):
                self._scales(node.inputs[1])
            kept = self._kept_by_declaration(node)
            node.inputs = [self._as(t, is_half and i not in kept[0]) for i, t in enumerate(list(node.inputs))]
            if is_half:
                self._attributes(node)
                for i, tensor in enumerate(node.outputs):
                    if is_float(tensor) and i not in kept[1]:
                        self._retype(tensor)
        for tensor in list(graph.outputs):
            became = id(tensor) in self._in_half
            if is_float(tensor) and self.io:
                self._output(tensor, self.dtype)
            elif became and not self.io:
                self._output(tensor, _FLOAT)
        graph.nodes = topological(graph)

    def _kept_by_declaration(self, node: gs.Node) -> tuple[set[int], set[int]]:
        """Indices of the inputs and outputs that an op of the dialect always has in float32."""
        op = OPS.get(node.op) if node.domain == DOMAIN else None
        if op is None:
            return set(), set()
        half = f"tensor({self.dtype.name})"
        inputs = {place for place, i in enumerate(op.inputs) if half not in i.types}
        names = {op.inputs[place].name for place in inputs}
        outputs = {place for place, o in enumerate(op.outputs) if o.follows is None or o.follows in names}
        return inputs, outputs

    def _retype(self, tensor: gs.Tensor) -> None:
        tensor.dtype = self.dtype
        self._in_half.add(id(tensor))

    def _as(self, tensor: gs.Tensor, half: bool) -> gs.Tensor:
        """`tensor` in half precision, or in float32; unchanged if it already is, or is of another type."""
        is_half = id(tensor) in self._in_half
        if half == is_half or not (is_half or is_float(tensor)):
            return tensor
        key = id(tensor), half
        if key not in self._made:
            if isinstance(tensor, gs.Constant):
                array = narrowed(values(tensor), self.dtype, **self._limits(tensor))
                self._made[key] = constant(f"{tensor.name}/{self.dtype.name}", array)
            else:
                self._made[key] = self._narrow(tensor) if half else self._cast(tensor, _FLOAT)
        return self._made[key]

    def _limits(self, tensor: gs.Constant) -> dict[str, float]:
        """Arguments of `narrowed`: from which size on numbers of `tensor` mean infinity, and what replaces them."""
        if id(tensor) in self._masks:
            return {"above": bound(self.dtype)}
        if all(reader.op == "Clip" for reader in tensor.outputs):
            return {"becomes": float(ml_dtypes.finfo(self.dtype).max)}
        return {}

    def _narrow(self, tensor: gs.Tensor) -> gs.Tensor:
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is not None and maker.op == "Cast" and is_integer(maker.inputs[0]):
            return self._cast(maker.inputs[0], self.dtype)  # in one cast
        if id(tensor) in self._masks and reaches_far(tensor, bound(self.dtype)):
            return self._cast(saturated(self.graph, tensor, self.dtype), self.dtype)
        return self._cast(tensor, self.dtype)

    def _scales(self, tensor: gs.Constant) -> None:
        """Narrow scales, but keep them positive, as runtimes require, also for blocks of zeros."""
        if is_float(tensor) and (id(tensor), True) not in self._made:
            smallest = ml_dtypes.finfo(self.dtype).smallest_subnormal
            array = np.maximum(narrowed(values(tensor), self.dtype), smallest)
            self._made[id(tensor), True] = constant(f"{tensor.name}/{self.dtype.name}", array)

    def _cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Variable:
        self.casts += 1
        name = f"precision/{tensor.name}/{dtype.name}"
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        cast = insert(self.graph, "Cast", [tensor], name, attrs={"to": to}, dtype=dtype)
        cast.shape = tensor.shape
        return cast

    def _output(self, tensor: gs.Tensor, dtype: np.dtype) -> None:
        """Output `tensor` in another type, under its name."""
        converted, shape = self._as(tensor, dtype != _FLOAT), tensor.shape
        if converted is not tensor:
            rename_output(self.graph, tensor, converted)
        converted.dtype, converted.shape = dtype, shape

    def _attributes(self, node: gs.Node) -> None:
        """Change types that attributes contain."""
        for key in ("to", "dtype", "output_dtype"):
            if node.attrs.get(key) == onnx.TensorProto.FLOAT:
                node.attrs[key] = self._onnx
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            array = np.zeros(1, np.float32) if value is None else np.asarray(value.values)
            node.attrs["value"] = gs.Constant(f"{node.name}/value", narrowed(array, self.dtype))


def narrowed(array: np.ndarray, dtype: np.dtype, *, above: float = MASK, becomes: float | None = None) -> np.ndarray:
    """`array` in half precision. Finite numbers beyond ± `above` become ± `becomes`, by default `bound(dtype)`."""
    far = np.isfinite(array) & (np.abs(array) >= above)
    if far.any():
        array = np.where(far, np.sign(array) * (becomes or bound(dtype)), array)
    return np.asarray(array).astype(dtype)


def _renew_bodies(graph: gs.Graph) -> None:
    """Write the reference bodies again, for the new types of the dialect's nodes."""
    graph.functions = [function for function in graph.functions if function.domain != DOMAIN]
    for node in graph.nodes:
        if node.domain == DOMAIN:
            inputs = {i.name: t for i, t in zip(OPS[node.op].inputs, node.inputs, strict=False) if t.name}
            add_body(graph, OPS[node.op], Form({key: type_of(t) for key, t in inputs.items()}, node.attrs))
