"""The dense model in ONNX Runtime: as it is, and with dynamically quantized int8 weights."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from trimtab.compiler.checks.peers.cached import cached_model
from trimtab.compiler.checks.peers.model import PeerModel
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.passes.dynamic_int8 import quantize_file


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
    parts = (onnxruntime.__version__, str(saturates))
    return cached_model("dense-int8", dense, parts, lambda out: quantize_file(dense, out, reduce_range=saturates))
