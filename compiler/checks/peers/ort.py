"""The dense model in ONNX Runtime: as it is, and with dynamically quantized int8 weights."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from trimtab.compiler.checks.peers.cached import cached_model
from trimtab.compiler.checks.peers.model import PeerModel
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.dynamic_int8 import INT8_OPS, quantize_file
from trimtab.passes.graph.io import load_graph, save_graph
from trimtab.passes.graph.widen import widen
from trimtab.passes.temporary import temporary_folder


def dense_fp32(model: PeerModel, threads: int) -> Run:
    """The dense model, canonicalized, under the session options of trimtab's own engines."""
    return _open(model.canonical, threads)


def dense_int8(model: PeerModel, threads: int) -> Run:
    """The dense model with int8 weights, one scale per output channel, and activation scales computed at run time."""
    return _open(quantized(model.canonical), threads)


def _open(path: Path, threads: int) -> Run:
    return OnnxRuntimeRunner(path, session_options(threads, spinning=True)).run


def quantized(dense: Path) -> Path:
    """The dense model through onnxruntime.quantization.quantize_dynamic; made once and stored in the cache."""
    saturates = get_target("onnxruntime").probe().saturates
    parts = (onnxruntime.__version__, str(saturates), "half")  # "half": earlier files have no products of such models
    return cached_model("dense-int8", dense, parts, lambda out: _quantize(dense, out, saturates))


def _quantize(dense: Path, out: Path, saturates: bool) -> None:
    """Products in half precision become float32 before, as in the pass dynamic-int8: the quantizer takes no others."""
    graph = load_graph(dense)
    infer_shapes(graph)
    with temporary_folder("int8") as folder:
        products = [node for node in graph.nodes if node.op in INT8_OPS or node.op == "Gemm"]  # it becomes a MatMul
        if widen(graph, products, "dense-int8"):
            save_graph(graph, dense := folder / "model.onnx")
        quantize_file(dense, out, reduce_range=saturates)
