"""The dense model in OpenVINO on the CPU, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimtab.compiler.feeds import Run
from trimtab.passes.errors import TargetError


def fp32(dense: Path, threads: int) -> Run:
    """Everything in float32."""
    return _open(dense, threads, "f32")


def bf16(dense: Path, threads: int) -> Run:
    """Matrix products in bfloat16, which is fastest where the CPU has instructions for it."""
    return _open(dense, threads, "bf16")


def _open(dense: Path, threads: int, precision: str) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise TargetError(f"OpenVINO is not available ({error})", hint="pip install 'trimtab[peers]'") from error
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    try:
        compiled = core.compile_model(str(dense), "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TargetError(f"OpenVINO cannot take this model ({reason})", hint="leave this peer out") from error
    names = [output.get_any_name() for output in compiled.outputs]
    request = compiled.create_infer_request()

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = request.infer(dict(feeds))
        return {name: found[i] for i, name in enumerate(names)}

    return run
