"""Damage: to bytes, to values of JSON and YAML, to protobuf messages. Each changes a little, at a random place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import ModelProto, helper, numpy_helper

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 65_536, 2**31, -(2**31), 2**62, 2**70, 0.5, -0.0, 1e300, float("nan"),
    float("inf"), "", "x", "0", "name", "..", "a/b", "\0", "ü" * 40, "{}", [], [0], [1, 2, 3], [[]], {}, {"a": 1},
    {"": None}, [None], "9" * 60,
]  # fmt: skip
"""Values that a field may hold in place of its own."""


def damage_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut, repeat or drop a stretch."""
    if not data:
        return bytes(rng.integers(0, 256, 8, dtype=np.uint8))
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 65))
    how = rng.integers(5)
    if how == 0:
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        return bytes(flipped)
    if how == 1:
        return data[:at]
    if how == 2:
        return data[:at] + data[at + length :]
    if how == 3:
        return data[:at] + data[at : at + length] + data[at:]
    return data[:at] + bytes(rng.integers(0, 256, length, dtype=np.uint8)) + data[at + length :]


def damage_value(value: Any, rng: np.random.Generator) -> Any:
    """A copy of nested lists, mappings and scalars, with one part replaced, removed, renamed, repeated or moved."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return _odd(rng)
    container, key = places[int(rng.integers(len(places)))]
    how = rng.integers(6)
    if how <= 2:
        container[key] = _odd(rng)
    elif how == 3:
        del container[key]
    elif how == 4:
        other, name = places[int(rng.integers(len(places)))]
        if isinstance(other, list) and not 0 <= name < len(other):
            return value
        container[key] = copy.deepcopy(other[name])
    elif isinstance(container, dict):
        container[str(_odd(rng))] = container.pop(key)
    else:
        container.insert(key, copy.deepcopy(container[key]))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _odd(rng: np.random.Generator) -> Any:
    return copy.deepcopy(ODD[int(rng.integers(len(ODD)))])


def damage_message(message: Message, rng: np.random.Generator) -> None:
    """Change one field, at any depth: another value, gone, another element's, repeated or moved."""
    changes = list(_changes(message, rng))
    changes[int(rng.integers(len(changes)))]()


def _changes(message: Message, rng: np.random.Generator) -> Iterator[Callable[[], Any]]:
    """One possible change for each field of `message` and of the messages in it."""
    for field, value in message.ListFields():
        if field.is_repeated:
            yield lambda m=message, f=field: _change_list(getattr(m, f.name), f, rng)
            for item in list(value)[:64]:
                if isinstance(item, Message):
                    yield from _changes(item, rng)
        elif isinstance(value, Message):
            yield lambda m=message, f=field: m.ClearField(f.name)
            yield from _changes(value, rng)
        else:
            yield lambda m=message, f=field: _change_scalar(m, f, rng)


def _change_list(items: Any, field: Any, rng: np.random.Generator) -> None:
    at = int(rng.integers(len(items)))
    how = rng.integers(4)
    if how == 0 or len(items) == 1:
        del items[at]
    elif how == 1:
        item = items[at]
        items.append(item)
    elif how == 2:
        other = int(rng.integers(len(items)))
        kept = [copy.deepcopy(item) for item in items]
        kept[at], kept[other] = kept[other], kept[at]
        del items[:]
        items.extend(kept)
    elif field.message_type is None:
        items[at] = _scalar(field, items[at], rng)
    else:
        items[at].Clear()


def _change_scalar(message: Message, field: Any, rng: np.random.Generator) -> None:
    if rng.integers(4) == 0:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), rng))


def _scalar(field: Any, value: Any, rng: np.random.Generator) -> Any:
    """Another value of the field's type."""
    if isinstance(value, str):
        return ["", "x", value + "x", value[:-1], "ü", "a/b", "input_ids"][int(rng.integers(7))]
    if isinstance(value, bytes):
        return damage_bytes(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return float([0, -1, 1e30, np.nan, np.inf, value * 2][int(rng.integers(6))])
    numbers = [0, 1, -1, 2, 7, 99, value + 1, value - 1, -value, 2**31 - 1]
    number = int(numbers[int(rng.integers(len(numbers)))])
    if field.enum_type is not None:  # protobuf itself refuses other values
        return int(rng.choice(sorted(field.enum_type.values_by_number)))
    return number if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64) else abs(number)


_UNARY = [
    "Relu",
    "Sigmoid",
    "Identity",
    "Neg",
    "Erf",
    "Tanh",
    "Cast",
    "Softmax",
    "Abs",
    "Exp",
    "Shape",
    "Not",
    "Dropout",
]
_BINARY = ["Add", "Mul", "Sub", "Div", "MatMul", "Pow", "Max", "Gather", "Reshape", "Equal", "Concat", "Expand"]


def rewire(model: ModelProto, rng: np.random.Generator) -> None:
    """Change what a graph computes, and keep it well-formed: other ops, inputs, weights, types, outputs."""
    graph = model.graph
    at = int(rng.integers(len(graph.node)))
    node, how = graph.node[at], int(rng.integers(9))
    before = [name for each in graph.node[:at] for name in each.output]
    before += [each.name for each in (*graph.input, *graph.initializer)]
    if how == 0:
        kinds = _UNARY if len(node.input) == 1 else _BINARY
        node.op_type = str(rng.choice(kinds))
        del node.attribute[:]
        attributes = {
            "Cast": {"to": int(rng.choice([1, 6, 7, 9, 10, 11]))},
            "Concat": {"axis": int(rng.integers(-1, 2))},
        }
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.get(node.op_type, {}).items())
    elif how == 1 and node.input:
        node.input[int(rng.integers(len(node.input)))] = str(rng.choice(before))
    elif how == 2:
        name = f"new{len(graph.node)}"
        kind = str(rng.choice(["Identity", "Relu", "Cast", "Unsqueeze", "Transpose"]))
        inputs = [node.output[0], "new_axis"] if kind == "Unsqueeze" else [node.output[0]]
        if kind == "Unsqueeze" and not any(each.name == "new_axis" for each in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(np.array([0]), "new_axis"))
        graph.node.insert(at + 1, helper.make_node(kind, inputs, [name], name, **({"to": 1} if kind == "Cast" else {})))
        for later in graph.node[at + 2 :]:
            later.input[:] = [name if each == node.output[0] else each for each in later.input]
    elif how <= 5 and graph.initializer:
        _change_weight(graph.initializer[int(rng.integers(len(graph.initializer)))], rng)
    elif how == 6:
        kind = int(rng.choice([1, 7, 10, 11]))
        graph.output.append(helper.make_tensor_value_info(str(rng.choice(before)), kind, None))
    elif how == 7:
        model.opset_import[0].version = int(rng.integers(7, 27))
    else:
        value = graph.input[0].type.tensor_type
        value.elem_type = int(rng.choice([1, 6, 7, 10]))
        if rng.integers(2):
            for dim in value.shape.dim:
                dim.dim_value = int(rng.choice([0, 1, 3, 4, 8, 100]))


def _change_weight(tensor: onnx.TensorProto, rng: np.random.Generator) -> None:
    """Another type, shape or other values, stored as they should be."""
    array = numpy_helper.to_array(tensor)
    changes: list[Callable[[], np.ndarray]] = [
        lambda: array.astype(rng.choice(["float16", "float64", "int8", "int64", "bool"])),
        lambda: array.T,
        lambda: array.reshape(-1),
        lambda: array[None],
        lambda: array[:0] if array.ndim else array,
        lambda: array[:1] if array.ndim else array,
        lambda: np.zeros_like(array),
        lambda: np.full_like(array, rng.choice([-1, 0, 1, 3, 100])),
        lambda: (array * np.float32(1e25)).astype(array.dtype) if array.dtype.kind == "f" else -array,
        lambda: np.full_like(array, np.nan) if array.dtype.kind == "f" else array + 1,
    ]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(_pick(changes, rng)()), tensor.name))


def _pick(choices: list[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]
