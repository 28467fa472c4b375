"""What an op of the dialect is: one declaration, from which schema, reference body and nodes are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import onnx.shape_inference
from onnx.defs import OpSchema

from trimtab.plugins.sizes import Shapes, Size

DOMAIN = "trimtab"
"""The ONNX operator-set domain of every op declared here."""

VERSION = 1
OPSET = 18
"""The oldest opset of a model that the reference bodies can stand in."""

FLOAT = ("tensor(float)",)
ACTIVATION = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
"""Types of activations, and of the scales and biases beside weights. Whatever they are, ops compute in float."""
INT32 = ("tensor(int32)",)
WEIGHTS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int8)", "tensor(uint8)")
"""Types of weights: as they are; int8 with a scale per row; two int4 to a byte with a scale per 32 of a row."""

Shape = list[int | str | None]
Value = int | str


@dataclass(frozen=True)
class Input:
    """An input of an op.

    Attributes:
        types: ONNX names of those it may have.
        optional: it may be left out.
    """

    name: str
    types: Sequence[str]
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op, an integer or a string. Nodes always carry all: runtimes differ in how they default.

    Attributes:
        choices: of a string, those it may be.
    """

    name: str
    default: Value
    doc: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """How a node uses its op: what its reference body hangs on.

    Attributes:
        given: type of each input that is given, by ONNX name such as "tensor(float)".
        attributes: all of them.
    """

    given: Mapping[str, str]
    attributes: Mapping[str, Value]


@dataclass(frozen=True)
class Op:
    """One op of the dialect: one kernel launch.

    Attributes:
        output: name and ONNX type of its one output; or, for a type, the name of the input whose type it has.
        infer: the rule for the shape of the output, by those of the inputs and the attributes; None where not known.
        body: the statements of its reference body, in ONNX's text form, for the form of a node. Attributes are
            written @name where they may vary between nodes of a model.
    """

    name: str
    doc: str
    inputs: tuple[Input, ...]
    output: tuple[str, str]
    attributes: tuple[Attribute, ...]
    infer: Callable[[Shapes, Mapping[str, Value]], list[Any] | None] = field(repr=False)
    body: Callable[[Form], str] = field(repr=False)

    @property
    def follows(self) -> str | None:
        """The input whose type the output has; None where it has one of its own."""
        return self.output[1] if any(i.name == self.output[1] for i in self.inputs) else None

    def schema(self) -> OpSchema:
        """For ONNX's checker and shape inference."""
        option = OpSchema.FormalParameterOption
        kinds = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
        made = OpSchema(
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
                OpSchema.FormalParameter(self.output[0], f"T_{self.output[1]}" if self.follows else self.output[1])
            ],
            type_constraints=[(f"T_{i.name}", list(i.types), i.doc) for i in self.inputs],
            attributes=[OpSchema.Attribute(a.name, kinds[type(a.default)], a.doc) for a in self.attributes],
        )
        made.set_type_and_shape_inference_function(self._infer)
        return made

    def function(self, form: Form, opset: int) -> onnx.FunctionProto:
        """The reference body of a node, for a model of `opset`."""
        signature = f"{self.name} <{', '.join(a.name for a in self.attributes)}>" if self.attributes else self.name
        inputs = ", ".join(i.name for i in self.inputs)
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{signature} ({inputs}) => ({self.output[0]})\n'
            f"{{\n{self.body(form)}\n}}"
        )
        made: onnx.FunctionProto = onnx.parser.parse_function(text)
        return made

    def shape(self, shapes: Mapping[str, Shape | None], attributes: Mapping[str, Value]) -> Shape | None:
        """Of the output: numbers, names, and None for sizes that have none; None where nothing is known."""
        sizes = {
            name: None if shape is None else [size if isinstance(size, int) else Size(size) for size in shape]
            for name, shape in shapes.items()
        }
        found = self.infer(sizes, attributes)
        return None if found is None else [size.name if isinstance(size, Size) else size for size in found]

    def _infer(self, context: onnx.shape_inference.InferenceContext) -> None:
        """Tell the type of the output; and its shape, as far as those of the inputs tell."""
        shapes = {i.name: _shape(context, number) for number, i in enumerate(self.inputs)}
        attributes = {a.name: _attribute(context, a) for a in self.attributes}
        found = self.shape(shapes, attributes)
        kind: int = onnx.TensorProto.INT32
        if self.follows is not None:
            number = next(number for number, i in enumerate(self.inputs) if i.name == self.follows)
            proto = context.get_input_type(number)
            kind = onnx.TensorProto.FLOAT if proto is None else proto.tensor_type.elem_type
        context.set_output_type(0, onnx.helper.make_tensor_type_proto(kind, found))


def _shape(context: onnx.shape_inference.InferenceContext, number: int) -> Shape | None:
    if number >= context.get_num_inputs() or not context.has_input(number):
        return None
    proto = context.get_input_type(number)
    if proto is None or not proto.tensor_type.HasField("shape"):
        return None
    sizes = {"dim_value": lambda d: d.dim_value, "dim_param": lambda d: d.dim_param, None: lambda d: None}
    return [sizes[dim.WhichOneof("value")](dim) for dim in proto.tensor_type.shape.dim]


def _attribute(context: onnx.shape_inference.InferenceContext, attribute: Attribute) -> Value:
    proto = context.get_attribute(attribute.name)
    if proto is None:
        return attribute.default
    found: Value = onnx.helper.get_attribute_value(proto)
    return found.decode() if isinstance(found, bytes) else found
