"""The declaration of an op of the dialect. Schema, reference body and nodes are generated from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx.shape_inference
from onnx.defs import OpSchema

from trimtab.plugins.sizes import Counted, Shapes, Size

DOMAIN = "trimtab"
"""The ONNX operator-set domain of every op declared here."""

VERSION = 1
OPSET = 18
"""The oldest opset of a model with reference bodies."""

FLOAT = ("tensor(float)",)
ACTIVATION = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
"""Types of activations, scales and biases. For all of them, ops compute in float."""
INT32 = ("tensor(int32)",)
WEIGHTS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)", "tensor(uint8)")
"""Types of weights: floats; int8 with a scale per row; int4, two per byte, with a scale per 32 values of a row."""

Shape = list[int | str | None]
Value = int | str
Rule = Callable[[Shapes, Mapping[str, Value]], list[Any] | None]
"""Shapes of the inputs and all attributes → the shape of an output; None if the shape is unknown."""


@dataclass(frozen=True)
class Input:
    """An input of an op.

    Attributes:
        types: ONNX names of the allowed types.
        optional: nodes may omit the input.
        role: "rows" is a constant with a row for each neuron or vocabulary entry, and "choice" the numbers of the rows,
            or blocks of them, that are computed. All else is "data".
    """

    name: str
    types: Sequence[str]
    doc: str
    optional: bool = False
    role: Literal["data", "choice", "rows"] = "data"


@dataclass(frozen=True)
class Output:
    """An output of an op.

    Attributes:
        type: its ONNX type, such as "tensor(int32)"; or the name of an input that is not optional, whose type it has.
        shape: the rule for its shape. A size that hangs on data is a `Counted`.
        optional: a node may leave it unnamed. Bodies compute it all the same: where nobody reads it, runtimes drop it.
    """

    name: str
    type: str
    doc: str
    shape: Rule = field(repr=False)
    optional: bool = False

    @property
    def follows(self) -> str | None:
        """The input whose type the output has; None if the output has a fixed type."""
        return None if self.type.startswith("tensor(") else self.type

    def type_in(self, input_types: Mapping[str, str]) -> str:
        """The output's ONNX type in a node whose inputs have these types."""
        return self.type if self.follows is None else input_types[self.follows]


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op, an integer or a string. Nodes have all attributes, as runtimes differ in their defaults.

    Attributes:
        choices: allowed values of a string.
    """

    name: str
    default: Value
    doc: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """How a node uses its op. The reference body depends on it.

    Attributes:
        given: type of each input that is given, by ONNX name such as "tensor(float)".
        attributes: all of them.
        unnamed: optional outputs that the node leaves unnamed, which kernels need not compute. Reference bodies compute
            them, as nodes of one model share a body.
    """

    given: Mapping[str, str]
    attributes: Mapping[str, Value]
    unnamed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Op:
    """One op of the dialect: one kernel launch.

    Attributes:
        outputs: in order; the first is not optional.
        body: the statements of its reference body, in ONNX's text form, for the form of a node. Attributes are
            written @name where they may vary between nodes of a model.
        across_ranks: what makes the output of those of ranks that have a part of the "rows" each: they are put side by
            side along the last axis, or summed. None: the op does not divide.
    """

    name: str
    doc: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    attributes: tuple[Attribute, ...]
    body: Callable[[Form], str] = field(repr=False)
    across_ranks: Literal["concat", "sum"] | None = None

    def __post_init__(self) -> None:
        names = [*(i.name for i in self.inputs), *(o.name for o in self.outputs)]
        required = {i.name for i in self.inputs if not i.optional}
        if len(set(names)) < len(names) or not self.outputs or self.outputs[0].optional:
            raise ValueError(f"{self.name}: names of inputs and outputs differ, and the first output is always there")
        if any(o.follows not in (None, *required) for o in self.outputs):
            raise ValueError(f"{self.name}: an output has its own type, or that of an input that is always given")

    def named(self, form: Form) -> tuple[Output, ...]:
        """The named outputs of a node."""
        return tuple(o for o in self.outputs if o.name not in form.unnamed)

    def schema(self) -> OpSchema:
        """The schema for ONNX's checker and shape inference."""
        option = OpSchema.FormalParameterOption
        kinds = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
        schema = OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            self.doc,
            inputs=[
                OpSchema.FormalParameter(
                    i.name, f"T_{i.name}", i.doc, param_option=option.Optional if i.optional else option.Single
                )
                for i in self.inputs
            ],
            outputs=[
                OpSchema.FormalParameter(
                    o.name,
                    o.type if o.follows is None else f"T_{o.follows}",
                    o.doc,
                    param_option=option.Optional if o.optional else option.Single,
                )
                for o in self.outputs
            ],
            type_constraints=[(f"T_{i.name}", list(i.types), i.doc) for i in self.inputs],
            attributes=[OpSchema.Attribute(a.name, kinds[type(a.default)], a.doc) for a in self.attributes],
        )
        schema.set_type_and_shape_inference_function(self._infer)
        return schema

    def function(self, form: Form, opset: int) -> onnx.FunctionProto:
        """The reference body of a node, for a model of `opset`."""
        signature = f"{self.name} <{', '.join(a.name for a in self.attributes)}>" if self.attributes else self.name
        inputs, outputs = ", ".join(i.name for i in self.inputs), ", ".join(o.name for o in self.outputs)
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{signature} ({inputs}) => ({outputs})\n'
            f"{{\n{self.body(form)}\n}}"
        )
        function: onnx.FunctionProto = onnx.parser.parse_function(text)
        _constants_as_tensors(function.node)
        return function

    def infer(self, shapes: Shapes, attributes: Mapping[str, Value]) -> dict[str, list[Any] | None]:
        """Output → its shape, in the kind of sizes that `shapes` has; None for an unknown shape."""
        return {o.name: o.shape(shapes, attributes) for o in self.outputs}

    def shapes(
        self, inputs: Mapping[str, Shape | None], attributes: Mapping[str, Value], node: str | None = None
    ) -> dict[str, Shape | None]:
        """Output → its shape: numbers, names, and None for unnamed sizes; None for an unknown shape.

        Args:
            node: name of the node, part of the names of sizes that depend on data. Without it such sizes are unnamed.
        """
        sizes = {
            name: None if shape is None else [size if isinstance(size, int) else Size(size) for size in shape]
            for name, shape in inputs.items()
        }
        return {
            name: None if shape is None else [_plain(size, node) for size in shape]
            for name, shape in self.infer(sizes, attributes).items()
        }

    def _infer(self, context: onnx.shape_inference.InferenceContext) -> None:
        """Infer the types of the outputs, and their shapes if the input shapes determine them."""
        protos = {i.name: _input_type(context, number) for number, i in enumerate(self.inputs)}
        attributes = {a.name: _attribute(context, a) for a in self.attributes}
        try:
            inferred = self.shapes({name: _shape(proto) for name, proto in protos.items()}, attributes)
        except IndexError:  # the op does not support this rank; the runtime reports the error
            inferred = dict.fromkeys(o.name for o in self.outputs)
        for number, output in enumerate(self.outputs[: context.get_num_outputs()]):
            if output.follows is None:
                kind = onnx_type(output.type)
            else:
                proto = protos[output.follows]
                kind = onnx.TensorProto.FLOAT if proto is None else proto.tensor_type.elem_type
            context.set_output_type(number, onnx.helper.make_tensor_type_proto(kind, inferred[output.name]))


def _constants_as_tensors(nodes: Iterable[onnx.NodeProto]) -> None:
    """Turn `Constant <value_ints = [1]>` into tensors, in branches too.

    Older ONNX Runtimes look into no others when they infer shapes, and graphsurgeon's constant folding makes float64 of
    `value_float`.
    """
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _constants_as_tensors(attribute.g.node)
            elif node.op_type == "Constant" and attribute.name in dtypes and not attribute.ref_attr_name:
                array = np.array(onnx.helper.get_attribute_value(attribute), dtypes[attribute.name])
                attribute.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))


def onnx_type(name: str) -> int:
    """ONNX's number of the type `name`, such as "tensor(int32)"."""
    return int(onnx.TensorProto.DataType.Value(name[len("tensor(") : -1].upper()))


def _plain(size: Any, node: str | None) -> int | str | None:
    if isinstance(size, Counted):
        return None if node is None else f"{node}.{size.name}"
    return size.name if isinstance(size, Size) else int(size)


def _input_type(context: onnx.shape_inference.InferenceContext, number: int) -> onnx.TypeProto | None:
    given = number < context.get_num_inputs() and context.has_input(number)
    return context.get_input_type(number) if given else None


def _shape(proto: onnx.TypeProto | None) -> Shape | None:
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    sizes = {"dim_value": lambda d: d.dim_value, "dim_param": lambda d: d.dim_param, None: lambda d: None}
    return [sizes[dim.WhichOneof("value")](dim) for dim in proto.tensor_type.shape.dim]


def _attribute(context: onnx.shape_inference.InferenceContext, attribute: Attribute) -> Value:
    proto = context.get_attribute(attribute.name)
    if proto is None:
        return attribute.default
    value: Value = onnx.helper.get_attribute_value(proto)
    return value.decode() if isinstance(value, bytes) else value
