"""Layers of random weights, in dense form and in the dialect's sparse ops, to time both forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.crossover import DenseForm
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.graph import insert, save_graph
from trimtab.passes.int8_rows import to_int8_rows
from trimtab.passes.matrices.quantize import in_form
from trimtab.passes.settle import use_int4_linear
from trimtab.passes.sparse_ffn.rows import RowForm, row_constants
from trimtab.plugins import SPARSE_DOWN, SPARSE_HEAD, SPARSE_UP, add_node

_BLOCKS: dict[DenseForm, str] = {"int8-blocks": "int8", "int4-blocks": "int4"}
_BLOCK = 32  # largest number of inputs that share a scale

Layer = Sequence[np.ndarray]
"""(gate, up, down), (up, down) or (head,): row-major by neuron or token, [rows, width]."""


def random_layers(rows: int, width: int, matrices: int, layers: int) -> list[Layer]:
    """Random weights; their values do not affect times."""
    rng = np.random.default_rng(0)
    scale = np.float32(2 * width**-0.5)
    return [[(rng.random((rows, width), np.float32) - 0.5) * scale for _ in range(matrices)] for _ in range(layers)]


def random_blocks(rng: np.random.Generator, tokens: int, blocks: int, k: int) -> np.ndarray:
    """A choice of k blocks for each token, int32 [tokens, k], ascending."""
    return np.stack([np.sort(rng.choice(blocks, k, replace=False)) for _ in range(tokens)]).astype(np.int32)


def dense_model(layers: Sequence[Layer], path: Path, form: DenseForm = "fp32", *, native: bool = False) -> Path:
    """x → y by dense products, layer after layer.

    Args:
        native: whether int4 products are the dialect's own op.
    """
    graph, width = _new(layers), layers[0][0].shape[1]
    x: gs.Tensor = graph.inputs[0]

    def product(x: gs.Tensor, w: np.ndarray, name: str) -> gs.Variable:
        return in_form(w, _BLOCKS.get(form, "fp32"), _BLOCK).emit(graph, x, name, np.dtype(np.float32))

    for i, (*ups, last) in enumerate(layers):
        if not ups:
            return _rounded(graph, product(x, last.T, f"{i}/head"), len(last), path, form, native)
        pre = [product(x, up.T, f"{i}/up.{j}") for j, up in enumerate(ups)]
        if len(ups) == 2:
            s = insert(graph, "Sigmoid", pre[:1], f"{i}/sigmoid", dtype=np.float32)
            a = insert(graph, "Mul", [pre[0], s], f"{i}/silu", dtype=np.float32)
            h = insert(graph, "Mul", [a, pre[1]], f"{i}/h", dtype=np.float32)
        else:
            h = insert(graph, "Relu", pre, f"{i}/relu", dtype=np.float32)
        x = insert(graph, "Add", [x, product(h, last, f"{i}/down")], f"{i}/residual", dtype=np.float32)
    return _rounded(graph, x, width, path, form, native)


def sparse_model(layers: Sequence[Layer], path: Path, block: int, form: RowForm, *, at_most: bool = False) -> Path:
    """x and the blocks of each layer, blocks0, blocks1, ... [1 or tokens, k] → y, by the sparse ops.

    Args:
        at_most: whether blocks may be -1.
    """
    graph, width = _new(layers), layers[0][0].shape[1]
    x: gs.Tensor = graph.inputs[0]
    for i, (*ups, last) in enumerate(layers):
        blocks = gs.Variable(f"blocks{i}", np.int32, ["choices", "k"])
        graph.inputs.append(blocks)
        parts: dict[str, gs.Tensor] = {"x": x, "blocks": blocks}
        if not ups:
            rows = row_constants(last, form, "weight", f"{i}")
            return _finish(graph, add_node(graph, SPARSE_HEAD, parts | rows, f"{i}/head"), None, path)
        for label, w in zip(("gate", "up")[2 - len(ups) :], ups, strict=True):
            parts |= row_constants(w, form, label, f"{i}")
        activation = "silu" if len(ups) == 2 else "relu"
        shared = {"block": block, "at_most": int(at_most)}
        h = add_node(graph, SPARSE_UP, parts, f"{i}/h", activation=activation, **shared)
        downs = row_constants(last, form, "down", f"{i}")
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, f"{i}/y", **shared)
        x = insert(graph, "Add", [x, y], f"{i}/residual", dtype=np.float32)
    return _finish(graph, x, width, path)


def _rounded(graph: gs.Graph, y: gs.Tensor, width: int, path: Path, form: DenseForm, native: bool) -> Path:
    """Write the graph that computes y, with the products quantized as `form` names."""
    path = _finish(graph, y, width, path)
    if form == "int8":
        quantize_file(path, path.with_name("int8.onnx"), reduce_range=False)
        return path.with_name("int8.onnx")
    if form == "int8-rows":
        to_int8_rows(graph, "trial", per_channel=True)
        graph.cleanup()
        save_graph(graph, path)
    if native and use_int4_linear(graph):
        save_graph(graph, path)
    return path


def _new(layers: Sequence[Layer]) -> gs.Graph:
    # x has a batch axis, as in models: without it, a product and the residual behind it would become one Gemm.
    x = gs.Variable("x", np.float32, ["batch", "tokens", layers[0][0].shape[1]])
    return gs.Graph(inputs=[x], opset=21, ir_version=10, name="trial")


def _finish(graph: gs.Graph, y: gs.Tensor, width: int | None, path: Path) -> Path:
    y.name, y.shape = "y", ["batch", "tokens", width or "rows"]
    graph.outputs = [y]
    save_graph(graph, path)
    return path
