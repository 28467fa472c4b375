"""The pass: activations and weights in half precision, strongly typed, so that the graph alone decides."""

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
"""In which QuantizeLinear takes half precision, and in which nearly every op takes bfloat16."""
_FLOAT = np.dtype(np.float32)


class Precision(Pass):
    """Compute in half precision what does not need more; inputs and outputs keep their types unless told.

    TensorRT takes precision from the graph, and GPUs multiply twice as fast and more in half; CPUs rarely do. It stands
    behind the passes that need weights in floating point.
    Exact end: type=float32.
    """

    name: ClassVar[str] = "precision"
    summary: ClassVar[str] = "float16 or bfloat16 in the graph, float32 where sums and ranges need it"

    type: Literal["float32", "float16", "bfloat16"] = Field("float16", description="of activations and weights")
    io: bool = Field(False, description="inputs and outputs too, such as a decoder's cache and logits")
    keep: tuple[str, ...] = Field((), description="further ops, by their ONNX names, that stay in float32")

    def bars(self, later: Pass) -> str | None:
        if self.type == "float32" or not (later.reads_layers or later.name in ("precision", "dynamic-int8")):
            return None
        return f"the graph has its types then, {self.type} among them"

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Retype `graph`. Reads its weights, one at a time."""
        if self.type == "float32":
            return PassResult(self.name, 0)
        raise_opset(graph, _OPSETS[self.type])
        infer_shapes(graph)
        fuse_norms(graph, self.keep)
        dtype = _TYPES[self.type]
        # On CPUs the dialect's kernels take float32.
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
        why = f"decides in float32, by values that {self.type} has rounded: near ties may fall otherwise"
        left = tuple(Left(output_name_of(node), why) for node in regions.deciding)
        return PassResult(self.name, len(regions.half), left, details)


class _Typing:
    """Gives the half of `regions` the type `dtype`, with casts where it meets what stays.

    Attributes:
        casts: how many there are.
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
                continue  # what it reads has stayed as it was
            wanted = id(node) in self.half
            if wanted and node.op in QUANTIZERS and isinstance(node.inputs[1], gs.Constant):
                self._scales(node.inputs[1])
            kept = self._kept_by_declaration(node)
            node.inputs = [self._as(t, wanted and i not in kept[0]) for i, t in enumerate(list(node.inputs))]
            if wanted:
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
        """Places of the inputs and outputs that an op of the dialect has in float32, whatever the others are."""
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
        """`tensor` in half precision, or in float32; itself where it is neither or that already."""
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
        """From where on numbers of `tensor` stand for infinity, and what they become."""
        if id(tensor) in self._masks:
            return {"above": bound(self.dtype)}
        if all(reader.op == "Clip" for reader in tensor.outputs):
            return {"becomes": float(ml_dtypes.finfo(self.dtype).max)}
        return {}

    def _narrow(self, tensor: gs.Tensor) -> gs.Tensor:
        maker = tensor.inputs[0] if tensor.inputs else None
        if maker is not None and maker.op == "Cast" and is_integer(maker.inputs[0]):
            return self._cast(maker.inputs[0], self.dtype)  # at once
        if id(tensor) in self._masks and reaches_far(tensor, bound(self.dtype)):
            return self._cast(saturated(self.graph, tensor, self.dtype), self.dtype)
        return self._cast(tensor, self.dtype)

    def _scales(self, tensor: gs.Constant) -> None:
        """Scales stay positive, as runtimes demand, also of blocks that are all zeros."""
        if is_float(tensor) and (id(tensor), True) not in self._made:
            least = ml_dtypes.finfo(self.dtype).smallest_subnormal
            array = np.maximum(narrowed(values(tensor), self.dtype), least)
            self._made[id(tensor), True] = constant(f"{tensor.name}/{self.dtype.name}", array)

    def _cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Variable:
        self.casts += 1
        name = f"precision/{tensor.name}/{dtype.name}"
        to = int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
        made = insert(self.graph, "Cast", [tensor], name, attrs={"to": to}, dtype=dtype)
        made.shape = tensor.shape
        return made

    def _output(self, tensor: gs.Tensor, dtype: np.dtype) -> None:
        """Let the graph put out `tensor` in another type, under its name."""
        made, shape = self._as(tensor, dtype != _FLOAT), tensor.shape
        if made is not tensor:
            rename_output(self.graph, tensor, made)
        made.dtype, made.shape = dtype, shape

    def _attributes(self, node: gs.Node) -> None:
        """Types that attributes tell."""
        for key in ("to", "dtype", "output_dtype"):
            if node.attrs.get(key) == onnx.TensorProto.FLOAT:
                node.attrs[key] = self._onnx
        if node.op == "ConstantOfShape":
            held = node.attrs.get("value")
            array = np.zeros(1, np.float32) if held is None else np.asarray(held.values)
            node.attrs["value"] = gs.Constant(f"{node.name}/value", narrowed(array, self.dtype))


def narrowed(array: np.ndarray, dtype: np.dtype, *, above: float = MASK, becomes: float | None = None) -> np.ndarray:
    """`array` in half precision. Finite numbers beyond ± `above` become ± `becomes`, by default `bound(dtype)`."""
    far = np.isfinite(array) & (np.abs(array) >= above)
    if far.any():
        array = np.where(far, np.sign(array) * (becomes or bound(dtype)), array)
    return np.asarray(array).astype(dtype)


def _renew_bodies(graph: gs.Graph) -> None:
    """Reference bodies for the types that the dialect's nodes have now."""
    graph.functions = [function for function in graph.functions if function.domain != DOMAIN]
    for node in graph.nodes:
        if node.domain == DOMAIN:
            inputs = {i.name: t for i, t in zip(OPS[node.op].inputs, node.inputs, strict=False) if t.name}
            add_body(graph, OPS[node.op], Form({key: type_of(t) for key, t in inputs.items()}, node.attrs))
