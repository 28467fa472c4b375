"""The dense model in ONNX Runtime: as it is, and with dynamically quantized int8 weights."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.feeds import Run
from trimtab.compiler.sources.source import weights_hash
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner, session_options
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.hashing import hash_bytes


def dense_fp32(dense: Path, threads: int) -> Run:
    """The dense model, canonicalized, under the session options of trimtab's own engines: both profit alike."""
    return OnnxRuntimeRunner(dense, session_options(threads)).run


def dense_int8(dense: Path, threads: int) -> Run:
    """The dense model with int8 weights, one scale per output channel, and activations quantized as they come."""
    return dense_fp32(quantized(dense), threads)


def quantized(dense: Path) -> Path:
    """The dense model through onnxruntime.quantization.quantize_dynamic; made once per model, kept in the cache."""
    saturates = get_target("onnxruntime").probe().saturates

    def make(part: Path) -> None:
        part.mkdir()
        quantize_file(dense, part / "model.onnx", reduce_range=saturates)

    key = hash_bytes(file_hash(dense), weights_hash(dense), onnxruntime.__version__, str(saturates))
    return entry("dense-int8", key, make) / "model.onnx"
