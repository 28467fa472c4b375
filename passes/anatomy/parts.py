"""Matches norms, embeddings and the head, counts parameters, and guesses the family."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from trimtab.passes.anatomy.model import FFN, Attention, Embedding, Head
from trimtab.passes.anatomy.scan import NORMS, SKIP_NORMS, Scan, only_producer
from trimtab.passes.graph.linear import Linear
from trimtab.passes.graph.weights import values

_FLOATS = frozenset([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
_SAMPLE = 16  # rows and columns compared to decide whether two tables are equal


def is_float(tensor: gs.Constant) -> bool:
    """True for a constant of a floating type: a parameter. Integers are shapes, indices or quantized values."""
    return dtype_to_onnx(tensor.dtype) in _FLOATS


def find_norms(scan: Scan) -> list[gs.Node]:
    """Normalisation nodes; for a written-out norm, the node that divides by the root of the mean square."""
    norms: list[gs.Node] = []
    for node in scan.nodes:
        if node.op in NORMS or node.op in SKIP_NORMS:
            norms.append(node)
        elif node.op == "Sqrt" and _is_mean_square(node.inputs[0]):
            norms += _dividing(node)
    return norms


def _is_mean_square(tensor: gs.Tensor) -> bool:
    """True for mean(x²), with or without + epsilon."""
    node = only_producer(tensor)
    if node is not None and node.op == "Add":
        sources = [only_producer(t) for t in node.inputs if not isinstance(t, gs.Constant)]
        node = sources[0] if len(sources) == 1 else None
    if node is None or node.op != "ReduceMean":
        return False
    square = only_producer(node.inputs[0])
    return square is not None and (square.op == "Pow" or (square.op == "Mul" and square.inputs[0] is square.inputs[1]))


def _dividing(root: gs.Node) -> list[gs.Node]:
    divisions = []
    for node in root.outputs[0].outputs:
        if node.op == "Div" and not isinstance(node.inputs[0], gs.Constant):
            divisions.append(node)
        elif node.op in ("Div", "Reciprocal"):
            divisions += [user for user in node.outputs[0].outputs if user.op == "Mul"][:1]
    return divisions


def find_embeddings(scan: Scan) -> list[Embedding]:
    """Float tables from which nodes select rows by computed integers."""
    embeddings: list[Embedding] = []
    for node in scan.nodes:
        tables: list[gs.Tensor] = []
        if node.op == "Gather" and not node.attrs.get("axis", 0) and not isinstance(node.inputs[1], gs.Constant):
            tables = [node.inputs[0]]
        elif node.op == "EmbedLayerNormalization":
            tables = list(node.inputs[2:5])
        embeddings += [
            Embedding(table, node)
            for table in tables
            if isinstance(table, gs.Constant) and len(table.shape) == 2 and is_float(table)
        ]
    return embeddings


def make_head(linears: Sequence[Linear], embeddings: Sequence[Embedding]) -> Head | None:
    """The head with the projections `linears`, in order of computation; None without any."""
    if not linears:
        return None
    tables = (embedding.table for embedding in embeddings)
    return Head(tuple(linears), next((table for table in tables if _same_table(linears[-1], table)), None))


def _same_table(linear: Linear, table: gs.Constant) -> bool:
    """True if W is the transposed table: the same constant, or a copy, which exporters write for a plain MatMul.

    A copy is compared in a few rows and columns, so that neither matrix is loaded whole.
    """
    if linear.quantized is not None or [linear.out_features, linear.in_features] != list(table.shape):
        return False
    if linear.weight is table:
        return True
    rows, columns = (np.linspace(0, size - 1, min(size, _SAMPLE), dtype=int) for size in table.shape)
    return bool(np.array_equal(linear.w().T[np.ix_(rows, columns)], values(table)[np.ix_(rows, columns)]))


def count_params(scan: Scan) -> int:
    """Elements of all distinct float constants; a quantized weight counts as the matrix that it represents."""
    constants = {id(t): t for node in scan.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    total = 0
    for linear in scan.linears:
        if linear.quantized is not None and constants.pop(id(linear.weight), None) is not None:
            total += linear.in_features * linear.out_features
            for scale in linear.quantized.inputs[1:3]:
                constants.pop(id(scale), None)
    return total + sum(int(np.prod(t.shape, dtype=np.int64)) for t in constants.values() if is_float(t))


def guess_family(
    scan: Scan,
    ffns: Sequence[FFN],
    attentions: Sequence[Attention],
    embeddings: Sequence[Embedding],
    norms: Sequence[gs.Node],
) -> str:
    """The family that the model resembles, for display; "transformer" if none, "unknown" without any block."""
    if not ffns and not attentions:
        return "unknown"
    activation = ffns[0].activation.name if ffns else "unknown"
    gated = bool(ffns) and ffns[0].gated
    packed = bool(attentions) and attentions[0].q is not None and attentions[0].q is attentions[0].k
    biased = bool(attentions) and attentions[0].q is not None and attentions[0].q.bias is not None
    root_mean_square = any("LayerNorm" not in node.op or "Simplified" in node.op for node in norms)
    relative_bias = any(attentions and e.table.shape[1] == attentions[0].heads for e in embeddings)
    if any(node.op == "Conv" for node in scan.nodes):
        return "vit"
    if root_mean_square:
        if relative_bias:
            return "t5"
        names = {"silu": "qwen2" if biased and not packed else "llama", "gelu_tanh": "gemma", "gelu": "gemma"}
        return names.get(activation, "transformer") if gated else "transformer"
    if gated:
        return "transformer"
    rotary = len(embeddings) == 1 and not relative_bias
    if rotary:
        return "gpt_neox" if packed else "transformer"
    if activation == "relu":
        return "opt"
    if packed:
        return "gpt2"
    return "bert" if activation == "gelu" else "transformer"
