"""Derives constraints on input values from the graph's structure: indices of tables, masks that are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from trimtab.passes.graph.limits import Packed
from trimtab.passes.graph.weights import values

_MICROSOFT = "com.microsoft"
_KEEPS = {"Identity", "Cast", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose", "Expand", "Tile", "Concat"}
"""Ops whose output contains every element of their first input unchanged (Concat: of every input)."""
_CHOOSES = {"Slice", "Split", "Where", "Gather", "Max", "Min", "Clip", "Mod", "Pad"}
"""Ops that drop or replace some elements: dropped or replaced elements need no row of a table."""
_STORED = {"DequantizeLinear", "Cast", "Identity", "Mul", "Div", "Add", "Sub"}
_INTEGERS = {
    getattr(TensorProto, name) for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
}
_EMBED = {0: 2, 1: 4}  # com.microsoft EmbedLayerNormalization: ids → words, segments → segment table
_ROTATE = {9: 7}  # com.microsoft GroupQueryAttention: positions → cosines
_LENGTHS = {"GroupQueryAttention": 5, "Attention": 3, "MultiHeadAttention": 4}
"""com.microsoft attention → the input that may contain each row's number of real tokens, counted from the first."""
_DEPTH = 24  # maximum number of nodes between an input and its reader


@dataclass(frozen=True)
class _Bounds:
    """The smallest and largest value that one reader allows; `whole` if it reads every element of the input."""

    smallest: int
    largest: int
    whole: bool


def index_bounds(tensor: gs.Tensor) -> tuple[int, int] | None:
    """The smallest and largest value of an input whose elements all index constant tables; None for other inputs.

    Elements may be cast, reshaped or shifted by a constant in between, like positions that start after padding.
    """
    bounds = [bound for bound in _readers(tensor) if bound.whole]
    if not bounds:
        return None
    return max(bound.smallest for bound in bounds), min(bound.largest for bound in bounds)


def safe_values(tensor: gs.Tensor) -> tuple[int, int] | None:
    """The smallest and largest value, at least 0, allowed by every table that elements of the input may index.

    Unlike in `index_bounds`, tables that only some elements index count too. None without such tables.
    """
    bounds = list(_readers(tensor))
    if not bounds:
        return None
    largest = max(0, min(bound.largest for bound in bounds))
    return min(largest, max(0, *(bound.smallest for bound in bounds))), largest


def packed_mask(tensor: gs.Tensor) -> Packed | None:
    """The `Packed` of an input from which attention reads counts of tokens, of whatever type; None for other inputs."""
    nodes = list(_counting(tensor, False, _DEPTH))
    for node in nodes:
        earlier = node.inputs[3] if node.op == "GroupQueryAttention" else None
        past = None if earlier is None else _source(earlier)
        if past is None or (isinstance(past, gs.Variable) and not past.inputs):
            tokens = _tokens(nodes) - {tensor.name}
            return Packed(tensor.name, past.name if past is not None and past.name else None, tuple(sorted(tokens)))
    return None


def _readers(tensor: gs.Tensor) -> Iterator[_Bounds]:
    if tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iuf":
        yield from _bounds(tensor, 0, _is_integer(tensor), True, _DEPTH)


def _bounds(tensor: gs.Tensor, moved: int, integers: bool, whole: bool, depth: int) -> Iterator[_Bounds]:
    """Bounds that the readers of `tensor` = input + `moved` set for the input.

    Args:
        integers: whether `tensor` contains integers; floats are followed to their Cast.
        whole: whether `tensor` contains every element of the input.
    """
    if not depth:
        return
    for node in tensor.outputs:
        for rows in table_rows(node, tensor):
            yield _Bounds(-moved, rows - 1 - moved, whole)
        offset = _offset(node, tensor)
        if offset is not None and (integers or not offset):
            integral = integers or node.op == "Cast"
            yield from _bounds(node.outputs[0], moved + offset, integral, whole, depth - 1)
        elif node.op in _CHOOSES and _hands_on(node, tensor):
            every = whole and node.op == "Slice" and _from_first(node) and _alone(node, tensor)
            for output in node.outputs:
                yield from _bounds(output, moved, integers, every, depth - 1)


def _hands_on(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether `node`, one of `_CHOOSES`, outputs elements of `tensor`; False if it only chooses by them."""
    if node.op == "Where":
        return node.inputs[0] is not tensor
    return node.op in ("Max", "Min") or node.inputs[0] is tensor


def _from_first(cut: gs.Node) -> bool:
    """Whether a Slice takes consecutive elements from the first on."""
    starts = cut.attrs.get("starts") if len(cut.inputs) < 2 else cut.inputs[1]
    steps = cut.inputs[4] if len(cut.inputs) > 4 else None
    parts = [(starts, 0), *([(steps, 1)] if steps is not None and steps.name else [])]
    for part, expected in parts:
        if isinstance(part, gs.Variable) or part is None:
            return False
        numbers = values(part) if isinstance(part, gs.Constant) else np.asarray(part)
        if (numbers != expected).any():
            return False
    return True


def _alone(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether only `node` reads elements of `tensor`: several readers may read different columns."""
    return all(other is node or other.op == "Shape" for other in tensor.outputs)


def table_rows(node: gs.Node, indices: gs.Tensor) -> Iterator[int]:
    """Rows of each constant table in which `node` looks up `indices`."""
    tables: list[tuple[gs.Tensor, int]] = []
    if node.op == "Gather" and len(node.inputs) == 2 and node.inputs[1] is indices:
        tables.append((node.inputs[0], int(node.attrs.get("axis", 0))))
    elif node.op == "GatherND" and node.inputs[1] is indices and _of_one_axis(node):
        tables.append((node.inputs[0], 0))
    elif node.op == "GatherBlockQuantized" and node.inputs[1] is indices:
        tables.append((node.inputs[0], int(node.attrs.get("gather_axis", 0))))
    elif node.op == "EmbedLayerNormalization" and node.domain == _MICROSOFT:
        places = [place for place in _EMBED if node.inputs[place] is indices]
        tables += [(node.inputs[_EMBED[place]], 0) for place in places]
    elif node.op == "GroupQueryAttention" and node.domain == _MICROSOFT:
        places = [place for place in _ROTATE if len(node.inputs) > place and node.inputs[place] is indices]
        tables += [(node.inputs[_ROTATE[place]], 0) for place in places]
    for table, axis in tables:
        shape = _constant_shape(table, 8)
        if shape is not None and -len(shape) <= axis < len(shape):
            yield shape[axis]


def _of_one_axis(node: gs.Node) -> bool:
    """Whether each index of a GatherND is one number: the last axis of the indices has size 1."""
    indices = node.inputs[1]
    if node.attrs.get("batch_dims", 0):
        return False
    if indices.shape:
        return bool(indices.shape[-1] == 1)
    maker = indices.inputs[0] if indices.inputs else None
    if (
        maker is None
        or maker.op != "Unsqueeze"
        or len(maker.inputs) < 2
        or not isinstance(maker.inputs[1], gs.Constant)
    ):
        return False
    axes, data = values(maker.inputs[1]), _source(maker.inputs[0]).shape
    last = {-1} if data is None else {-1, len(data)}
    return axes.size == 1 and int(axes.reshape(-1)[0]) in last


def _constant_shape(table: gs.Tensor, depth: int) -> tuple[int, ...] | None:
    """Shape of a constant, which may be cast, transposed or scaled; None for other tensors."""
    if isinstance(table, gs.Constant):
        return tuple(int(size) for size in table.shape)
    if not depth or len(table.inputs) != 1:
        return None
    node = table.inputs[0]
    if node.op == "Transpose":
        shape = _constant_shape(node.inputs[0], depth - 1)
        order = node.attrs.get("perm")
        return None if shape is None else tuple(shape[axis] for axis in order or reversed(range(len(shape))))
    if node.op not in _STORED:
        return None
    terms = node.inputs if node.op in ("Mul", "Div", "Add", "Sub") else node.inputs[:1]
    shapes = [_constant_shape(term, depth - 1) for term in terms]
    constant_shapes = [shape for shape in shapes if shape is not None]
    return tuple(np.broadcast_shapes(*constant_shapes)) if len(constant_shapes) == len(shapes) else None


def _offset(node: gs.Node, tensor: gs.Tensor) -> int | None:
    """The constant that `node` adds to each element of `tensor`; None if it computes something else."""
    if node.op in ("Add", "Sub") and len(node.inputs) == 2:
        other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
        if not isinstance(other, gs.Constant) or np.prod(other.shape, dtype=np.int64) != 1:
            return None
        by = values(other).reshape(-1)[0]
        if not np.isfinite(by) or by != int(by):
            return None
        if node.op == "Sub":
            return -int(by) if node.inputs[0] is tensor else None
        return int(by)
    if not _keeps(node, tensor):
        return None
    return 0 if node.op != "Cast" or node.attrs.get("to") in _INTEGERS else None


def _keeps(node: gs.Node, tensor: gs.Tensor) -> bool:
    return node.op in _KEEPS and (node.op == "Concat" or node.inputs[0] is tensor)


def _counting(tensor: gs.Tensor, summed: bool, depth: int) -> Iterator[gs.Node]:
    """Attention nodes that read counts of tokens computed from `tensor`; `summed`: `tensor` is already a sum."""
    if not depth:
        return
    for node in tensor.outputs:
        place = _LENGTHS.get(node.op) if node.domain == _MICROSOFT else None
        if summed and place is not None and len(node.inputs) > place and node.inputs[place] is tensor:
            yield node
        elif node.op == "EmbedLayerNormalization" and len(node.inputs) > 7 and node.inputs[7] is tensor:
            yield from _counting(node.outputs[1], True, depth - 1)
        elif node.op == "ReduceSum" and node.inputs[0] is tensor:
            yield from _counting(node.outputs[0], True, depth - 1)
        elif _keeps(node, tensor) or _offset(node, tensor) is not None:
            yield from _counting(node.outputs[0], summed, depth - 1)


def _tokens(attentions: Sequence[gs.Node]) -> set[str]:
    """Names of the graph's integer inputs on which the keys of all `attentions` depend.

    Only inputs common to all layers count, since a later layer may also attend to another stream.
    """
    shared: set[str] | None = None
    for node in attentions:
        key = node.inputs[1] if node.op != "Attention" and len(node.inputs) > 1 and node.inputs[1].name else None
        names, stack, seen = set[str](), [node.inputs[0] if key is None else key], set[int]()
        while stack:
            tensor = stack.pop()
            if id(tensor) in seen or isinstance(tensor, gs.Constant):
                continue
            seen.add(id(tensor))
            if not tensor.inputs and tensor.name:
                names |= {tensor.name} if _is_integer(tensor) else set()
            stack += [source for maker in tensor.inputs for source in maker.inputs]
        shared = names if shared is None else shared & names
        if len(shared) < 2:
            break
    return shared or set()


def _source(tensor: gs.Tensor) -> gs.Tensor:
    """`tensor` before casts."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in ("Cast", "Identity"):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def _is_integer(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).kind in "iu"
