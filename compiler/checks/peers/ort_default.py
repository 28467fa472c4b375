"""The dense model in ONNX Runtime as most users run it: their own exported file, default options everywhere."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

from trimtab.compiler.checks.peers.cached import cached_model
from trimtab.compiler.checks.peers.model import PeerModel
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.errors import TargetError


def fp32(model: PeerModel, threads: int) -> Run:
    """The exported file under default session options; only the number of threads is set, as for the other engines."""
    return _open(model.export(), threads)


def int8(model: PeerModel, threads: int) -> Run:
    """The exported file through quantize_dynamic with its default arguments: one weight scale per matrix.

    Raises:
        TargetError: quantize_dynamic does not take the file.
    """
    return _open(quantized(model.export()), threads)


def quantized(exported: Path) -> Path:
    """The quantized file; made once per model and stored in the cache.

    Raises:
        TargetError: quantize_dynamic does not take the file.
    """
    return cached_model("ort-int8-default", exported, (onnxruntime.__version__,), lambda out: _quantize(exported, out))


def _quantize(exported: Path, out: Path) -> None:
    try:
        quantize_file(exported, out, per_channel=False)
    except Exception as error:  # shape inference, protobuf and the quantizer raise errors of many kinds
        reason = str(error).strip().splitlines()[:1]
        raise TargetError(
            f"{exported}: quantize_dynamic with its default arguments does not take this model "
            f"({reason[0] if reason else type(error).__name__})",
            hint="leave the peer 'ort-int8-default' out",
        ) from error


def _open(path: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return OnnxRuntimeRunner(path, options).run
