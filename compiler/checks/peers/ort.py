"""The dense model in ONNX Runtime: as it is, and with dynamically quantized int8 weights."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import onnxruntime

from trimtab.compiler.cache import cache_dir
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner, session_options
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.io import model_fingerprint


def dense_fp32(dense: Path, threads: int) -> Run:
    """The dense model, canonicalized, under the session options of trimtab's own engines: both profit alike."""
    return OnnxRuntimeRunner(dense, session_options(threads)).run


def dense_int8(dense: Path, threads: int) -> Run:
    """The dense model with int8 weights, one scale per output channel, and activations quantized as they come."""
    return dense_fp32(quantized(dense), threads)


def quantized(dense: Path) -> Path:
    """The dense model through onnxruntime.quantization.quantize_dynamic; made once per model, kept in the cache."""
    key = hashlib.sha256(dense.read_bytes())
    key.update(model_fingerprint(load_graph(dense)).encode())
    saturates = get_target("onnxruntime").probe().saturates
    key.update(f"{onnxruntime.__version__} {saturates}".encode())
    path = cache_dir() / "dense-int8" / key.hexdigest() / "model.onnx"
    if not path.is_file():
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
            quantize_file(dense, Path(folder) / "model.onnx", reduce_range=saturates)
            path.parent.mkdir(exist_ok=True)
            for part in sorted(Path(folder).iterdir(), reverse=True):  # the data first, then the model that needs it
                part.replace(path.parent / part.name)
    return path
