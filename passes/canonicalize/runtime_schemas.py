"""Registers the output types of ONNX Runtime's own ops for ONNX's shape inference, which does not know them.

A graph of ONNX Runtime's optimizer or of GenAI's builder has no types between its nodes. Inference then stops at the
first `com.microsoft` op, and all tensors behind it, also an int32 mask, have no type.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import onnx
from onnx.defs import OpSchema

_SAME_SHAPE = frozenset([
    "BiasGelu", "FastGelu", "Gelu", "LayerNormalization", "QuickGelu", "RotaryEmbedding",
    "SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
])  # fmt: skip
"""Ops whose first output has the shape of their first input."""


def register_runtime_schemas(ops: Iterable[tuple[str, str, int]]) -> None:
    """Register those of `ops` in onnx that only ONNX Runtime defines.

    Args:
        ops: domain, name, and the version of the domain.
    """
    for domain, name, version in ops:
        if not _is_known(domain, name, version):
            schema = _runtime_schemas().get((domain, name))
            if schema is not None and schema.since_version <= version:
                onnx.defs.register_schema(_schema(schema))


def _is_known(domain: str, name: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(name, version, domain)
    except onnx.defs.SchemaError:
        return False
    return True


@lru_cache
def _runtime_schemas() -> dict[tuple[str, str], Any]:
    """Domain and name of an op of ONNX Runtime → its first schema. Empty if this runtime lists none."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # the runtime's documentation tools use it, too

    schemas: list[Any] = getattr(state, "get_all_operator_schema", list)()
    return {(s.domain, s.name): s for s in sorted(schemas, key=lambda s: int(s.since_version), reverse=True)}


def _schema(runtime_schema: Any) -> OpSchema:
    """The schema for onnx, with type inference."""
    option = OpSchema.FormalParameterOption

    def parameter(formal: Any) -> OpSchema.FormalParameter:
        kind = getattr(option, str(formal.option).rpartition(".")[2])
        return OpSchema.FormalParameter(formal.name, formal.typeStr, param_option=kind)

    schema = OpSchema(
        runtime_schema.name,
        runtime_schema.domain,
        runtime_schema.since_version,
        runtime_schema.doc or "",
        inputs=[parameter(formal) for formal in runtime_schema.inputs],
        outputs=[parameter(formal) for formal in runtime_schema.outputs],
        type_constraints=[(c.type_param_str, list(c.allowed_type_strs), "") for c in runtime_schema.type_constraints],
        attributes=[
            OpSchema.Attribute(name, getattr(OpSchema.AttrType, str(each.type).rpartition(".")[2]), required=False)
            for name, each in runtime_schema.attributes.items()
        ],
    )
    inputs, outputs = ([formal.typeStr for formal in side] for side in (runtime_schema.inputs, runtime_schema.outputs))
    allowed = {c.type_param_str: list(c.allowed_type_strs) for c in runtime_schema.type_constraints}

    def infer(context: onnx.shape_inference.InferenceContext) -> None:
        input_types = {place: context.get_input_type(place) for place in range(context.get_num_inputs())}
        types = {
            inputs[place]: proto.tensor_type.elem_type
            for place, proto in reversed(input_types.items())
            if place < len(inputs) and proto is not None and proto.HasField("tensor_type")
        }
        for place, parameter in enumerate(outputs[: context.get_num_outputs()]):
            kinds = allowed.get(parameter, [parameter])
            kind = types.get(parameter) or (_number(kinds[0]) if len(kinds) == 1 else None)
            if kind:
                proto = onnx.helper.make_tensor_type_proto(kind, None)
                first = input_types.get(0)  # without a type behind an op of another domain
                same = place == 0 and runtime_schema.name in _SAME_SHAPE
                if same and first is not None and first.tensor_type.HasField("shape"):
                    proto.tensor_type.shape.CopyFrom(first.tensor_type.shape)
                context.set_output_type(place, proto)

    schema.set_type_and_shape_inference_function(infer)
    return schema


def _number(kind: str) -> int | None:
    """ONNX's number of a type such as "tensor(int32)"; None for other types than tensors."""
    name = kind.removeprefix("tensor(").removesuffix(")").upper()
    return dict(onnx.TensorProto.DataType.items()).get(name) if kind.startswith("tensor(") else None
