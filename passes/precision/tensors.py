"""Properties of tensors and nodes that the analyses of precision need."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

MOVES = frozenset(["Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"])
"""Ops that return the elements of their first input."""

QUANTIZERS = frozenset(["DequantizeLinear", "QuantizeLinear"])

_SMALL = 1024  # maximum elements of a constant that is no layer's weight


def is_float(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is float32. A tensor without a type counts as float32, like most tensors between layers."""
    if not tensor.name or is_sequence(tensor):
        return False
    if tensor.dtype is None:
        return True
    try:
        return bool(np.dtype(tensor.dtype) == np.float32)
    except TypeError:  # a type that numpy lacks, by ONNX's number
        return bool(tensor.dtype == onnx.TensorProto.FLOAT)


def is_sequence(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a sequence of tensors, or another type that is not a tensor."""
    return isinstance(tensor, gs.Variable) and tensor.type != "tensor_type"


def is_integer(tensor: gs.Tensor) -> bool:
    """Whether `tensor` contains integers or booleans."""
    try:
        return bool(tensor.name) and tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iub"
    except TypeError:
        return False


def has_weights(node: gs.Node) -> bool:
    """Whether `node` reads a layer's weights: a large constant with several axes, so no bias."""
    shapes = (tensor.shape for tensor in node.inputs if isinstance(tensor, gs.Constant))
    return any(int(np.prod(shape)) > _SMALL and sum(size > 1 for size in shape) > 1 for shape in shapes)


def has_subgraphs(node: gs.Node) -> bool:
    """Whether `node` is a branch or a loop."""
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())
