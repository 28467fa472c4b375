"""PackedAttention as launches on a GPU: one for the context, and one behind it for `received`, where that is wanted.

What a token receives is a sum over all queries and heads of its sample. It needs the log-sum-exp of each query, which
no program of the first launch has but for its own queries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.plugins.dialect import FLOAT, Input, Op, Output, Value
from trimtab.plugins.packed_attention import PACKED_ATTENTION, body_of_received, body_of_rows
from trimtab.plugins.sizes import Shapes

__all__ = ["ATTENTION_RECEIVED", "ATTENTION_ROWS", "LAUNCHES", "divide"]

_SUMS = "log_sum_exp"
_CONTEXT, _RECEIVED = PACKED_ATTENTION.outputs


def _sums_shape(shapes: Shapes, attributes: Mapping[str, Value]) -> list[object] | None:
    return None if shapes["q"] is None else [shapes["q"][0], int(attributes["heads"])]


ATTENTION_ROWS = Op(
    "AttentionRows",
    doc="PackedAttention without `received`; and of the scores of each query the logarithm of the sum of e^score.",
    inputs=PACKED_ATTENTION.inputs,
    outputs=(_CONTEXT, Output(_SUMS, "tensor(float)", "[tokens, heads]", _sums_shape, optional=True)),
    attributes=PACKED_ATTENTION.attributes,
    body=body_of_rows,
)

ATTENTION_RECEIVED = Op(
    "AttentionReceived",
    doc="The output `received` of PackedAttention, behind AttentionRows.",
    inputs=(
        *(i for i in PACKED_ATTENTION.inputs if i.name != "v"),
        Input(_SUMS, FLOAT, "[tokens, heads], of AttentionRows"),
    ),
    outputs=(Output(_RECEIVED.name, _RECEIVED.type, _RECEIVED.doc, _RECEIVED.shape),),
    attributes=PACKED_ATTENTION.attributes,
    body=body_of_received,
)

LAUNCHES = (ATTENTION_ROWS, ATTENTION_RECEIVED)
"""The ops that PackedAttention is divided into."""

Tensors = dict[str, gs.Tensor]


def divide(node: gs.Node, given: Tensors, named: Tensors) -> list[tuple[Op, Tensors, Tensors]]:
    """The launches that compute a PackedAttention: op, inputs and outputs by name.

    Args:
        given: inputs of `node` by name.
        named: outputs of `node` by name.
    """
    context = {_CONTEXT.name: named[_CONTEXT.name]}
    if _RECEIVED.name not in named:
        return [(ATTENTION_ROWS, given, context)]
    tokens = named[_RECEIVED.name].shape
    sums = gs.Variable(
        f"{node.name}/{_SUMS}", np.float32, None if tokens is None else [tokens[0], int(node.attrs["heads"])]
    )
    known = {i.name for i in ATTENTION_RECEIVED.inputs}
    second = {name: tensor for name, tensor in given.items() if name in known} | {_SUMS: sums}
    return [
        (ATTENTION_ROWS, given, context | {_SUMS: sums}),
        (ATTENTION_RECEIVED, second, {_RECEIVED.name: named[_RECEIVED.name]}),
    ]
