"""Turns Constant nodes into initializers, and folds small constant expressions."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from trimtab.passes.canonicalize.simplify import guarded, remove_nodes
from trimtab.passes.graph import constant, output_name_of, topological, values

log = logging.getLogger(__name__)

SMALL = 256
"""Maximum elements of a constant that is read: shapes, axes, scalars, rotary frequencies, but no weights."""

_SCALARS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}

_FOLDED = frozenset([
    "Abs", "Add", "And", "Cast", "Concat", "Cos", "Div", "Equal", "Exp", "Floor", "Gather", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Reciprocal", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Sin", "Size", "Slice", "Sqrt", "Squeeze",
    "Sub", "Transpose", "Unsqueeze", "Where",
])  # fmt: skip  # none has large outputs for small inputs, as Expand and Range have


def is_small(tensor: gs.Tensor) -> bool:
    """True for a constant of at most `SMALL` elements."""
    return isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape, dtype=np.int64)) <= SMALL


def hoist_constants(graph: gs.Graph) -> int:
    """Turn Constant nodes into initializers, without loading their values."""
    kept = guarded(graph)
    hoisted = []
    for node in graph.nodes:
        if node.op != "Constant" or node.domain or id(node.outputs[0]) in kept:
            continue
        (key, value), output = next(iter(node.attrs.items())), node.outputs[0]
        if key == "value":
            initializer = gs.Constant(output.name, value._values)
        elif key in _SCALARS:
            initializer = constant(output.name, np.array(value, _SCALARS[key]))
        else:
            continue
        _become(output, initializer)
        hoisted.append(node)
    remove_nodes(graph, hoisted)
    return len(hoisted)


def fold_constants(graph: gs.Graph) -> int:
    """Evaluate nodes whose inputs are all small constants, in their own precision."""
    kept = guarded(graph)
    opset = [onnx.helper.make_opsetid("", graph.opset)]
    folded = []
    for node in topological(graph):
        if node.op not in _FOLDED or node.domain or len(node.outputs) != 1 or id(node.outputs[0]) in kept:
            continue
        inputs = {t.name: t for t in node.inputs if t.name}
        if not inputs or not all(is_small(t) for t in inputs.values()):
            continue
        function = onnx.helper.make_function(
            "trimtab.fold",
            "fold",
            list(inputs),
            [node.outputs[0].name],
            [OnnxExporter.export_node(node)],
            opset,
        )
        try:
            (result,) = ReferenceEvaluator(function).run(
                None, {name: values(t) for name, t in inputs.items()}, attributes={}
            )
        except (ArithmeticError, LookupError, NotImplementedError, RuntimeError, ValueError) as error:
            log.debug("left %s unfolded: %s", output_name_of(node), error)
            continue
        result = np.asarray(result)
        if result.size <= SMALL:
            _become(node.outputs[0], constant(node.outputs[0].name, result))
            folded.append(node)
    remove_nodes(graph, folded)
    return len(folded)


def _become(output: gs.Variable, new: gs.Constant) -> None:
    for consumer in list(output.outputs):
        consumer.inputs = [new if tensor is output else tensor for tensor in consumer.inputs]
