"""Biases in front of GELU in packed graphs: one op of ONNX Runtime's, the same numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import zoo
from rewrite import canonical, session

from trimtab.passes.contract import PassContext
from trimtab.passes.graph import save_graph
from trimtab.passes.settle import fuse_bias_gelu
from trimtab.passes.unpad import Unpad
from trimtab.plugins.library import register

LAYERS = 3


def optimized(path: Path) -> tuple[ort.InferenceSession, Counter[str]]:
    """A session over the file, and the ops that ONNX Runtime makes of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    register(options)
    made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return made, Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_one_op_adds_the_bias(approximate: str, tmp_path: Path) -> None:
    """Where it was a Gemm and a Gelu; also with no row at all."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    graph = canonical(zoo.exported("bert"))
    for node in graph.nodes:
        if node.op == "Gelu":
            node.attrs["approximate"] = approximate
    Unpad().run(graph, PassContext())
    save_graph(graph, tmp_path / "before.onnx")
    assert fuse_bias_gelu(graph) == LAYERS
    save_graph(graph, tmp_path / "after.onnx")
    before, ops_before = optimized(tmp_path / "before.onnx")
    after, ops = optimized(tmp_path / "after.onnx")
    name = {"none": "BiasGelu", "tanh": "FastGelu"}[approximate]
    assert ops[name] == LAYERS and ops["Gemm"] == ops_before["Gemm"] - LAYERS and not ops["Gelu"]
    for batch, tokens in ((0, 3), (1, 1), (3, 9)):
        feeds = zoo.feeds("bert", batch, tokens, rng)
        feeds["attention_mask"][1:, tokens // 2 :] = 0
        for old, new in zip(before.run(None, feeds), after.run(None, feeds), strict=True):
            np.testing.assert_allclose(new, old, atol=2e-5)


def test_padded_graphs_stay(tmp_path: Path) -> None:
    """With three axes ONNX Runtime does it by itself."""
    graph = canonical(zoo.exported("bert"))
    assert fuse_bias_gelu(graph) == 0
    save_graph(graph, tmp_path / "model.onnx")
    assert session(tmp_path / "model.onnx").run(None, zoo.feeds("bert", 1, 3, np.random.default_rng(0)))


def test_sums_that_are_no_bias_stay() -> None:
    """Where the sum is read elsewhere, too, or what is added is no constant of the product's width."""
    for spoil in ("read twice", "not constant"):
        graph = canonical(zoo.exported("bert"))
        Unpad().run(graph, PassContext())
        gelus = [node for node in graph.nodes if node.op == "Gelu"]
        for gelu in gelus:
            add = gelu.inputs[0].inputs[0]
            if spoil == "read twice":
                graph.outputs.append(gelu.inputs[0])
            else:
                add.inputs = [tensor if tensor.inputs else add.inputs[0] for tensor in add.inputs]
        assert fuse_bias_gelu(graph) == 0, spoil
