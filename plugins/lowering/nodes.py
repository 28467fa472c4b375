"""Nodes written as calls, for rewrites that take dozens of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

Operand: TypeAlias = gs.Tensor | np.ndarray | Sequence[int] | int
Range: TypeAlias = tuple[int, int]

_SAME = frozenset([
    "Abs", "Add", "Concat", "CumSum", "Div", "Erf", "Expand", "Floor", "Gather", "GatherElements", "Identity", "MatMul",
    "Max", "Min", "Mul", "Neg", "Pow", "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "ScatterElements",
    "Sigmoid", "Slice", "Softmax", "Sqrt", "Sub", "Tanh", "Transpose", "Unsqueeze",
])  # fmt: skip
"""Ops whose output is of the type of their first input."""


class Nodes:
    """Appends nodes to a graph, all named after what they stand for: `nodes("Add", x, 1)` is the sum.

    Args:
        name: of the node that they replace.
        constant: makes an initializer of a name and an array.
        values: reads those of an initializer.
        tokens: fewest and most tokens of a call, where that is known.
    """

    def __init__(
        self,
        graph: gs.Graph,
        name: str,
        constant: Callable[[str, np.ndarray], gs.Constant] = gs.Constant,
        values: Callable[[gs.Constant], np.ndarray] = lambda tensor: tensor.values,
        tokens: Range | None = None,
    ) -> None:
        self.graph, self.name, self._count = graph, name, 0
        self._constant, self.values, self.tokens = constant, values, tokens

    def __call__(self, op: str, *inputs: Operand, dtype: object = None, **attrs: object) -> gs.Variable:
        """Append a node of the standard op `op`; numbers and lists are int64 constants.

        Args:
            dtype: numpy type of the output, where it is not that of the first input.
        """
        tensors = [self.tensor(value) for value in inputs]
        if dtype is None and op in _SAME:
            dtype = type_of(tensors[0])
        if op == "Shape":
            dtype = np.int64
        name = self.next(op)
        output = gs.Variable(name, dtype)
        self.graph.nodes.append(gs.Node(op, name, attrs, tensors, [output]))
        return output

    def next(self, label: str) -> str:
        """A name that no other node has."""
        self._count += 1
        return f"lower/{self.name}/{label.lower()}.{self._count}"

    def tensor(self, value: Operand) -> gs.Tensor:
        """`value` as a tensor."""
        if isinstance(value, gs.Tensor):
            return value
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        return self._constant(self.next("constant"), array)

    def cast(self, x: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        """`x` in a type that numpy has; itself where it has it already."""
        if x.dtype is not None and type_of(x) == dtype:
            return x
        return self("Cast", x, dtype=dtype, to=onnx_type(dtype))

    def size(self, x: gs.Tensor, axis: int) -> gs.Variable:
        """The size of `x` along `axis`, as a tensor of one element."""
        end = {} if axis == -1 else {"end": axis + 1}
        return self("Shape", x, start=axis, **end)

    def topk(self, x: gs.Tensor, k: int) -> tuple[gs.Variable, gs.Variable]:
        """The `k` largest of the last axis, and their places."""
        name = self.next("TopK")
        outputs = [gs.Variable(f"{name}.values", type_of(x)), gs.Variable(f"{name}.places", np.int64)]
        self.graph.nodes.append(gs.Node("TopK", name, {"axis": -1}, [x, self.tensor([k])], outputs))
        return outputs[0], outputs[1]


def type_of(tensor: gs.Tensor) -> np.dtype:
    """The type of `tensor`. What has none is float, as everything between the layers of a model is."""
    if tensor.dtype is None:
        return np.dtype(np.float32)
    if isinstance(tensor.dtype, int):  # graphsurgeon leaves ONNX's number of what numpy itself lacks
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
    return np.dtype(tensor.dtype)


def onnx_type(dtype: np.dtype | type) -> int:
    """ONNX's number of a numpy type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
