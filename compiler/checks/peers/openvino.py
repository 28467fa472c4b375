"""The dense model in OpenVINO on the CPU, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.compiler.checks.peers.model import PeerModel
from trimtab.compiler.feeds import Run
from trimtab.passes.errors import TargetError
from trimtab.passes.optional import import_optional

EXTRA = "peers"


def fp32(model: PeerModel, threads: int) -> Run:
    """Everything in float32."""
    return open_model(model.canonical, threads, "f32")


def bf16(model: PeerModel, threads: int) -> Run:
    """Matrix products in bfloat16, which is fastest where the CPU has instructions for it."""
    return open_model(model.canonical, threads, "bf16")


def import_openvino() -> Any:
    """The module openvino.

    Raises:
        TargetError: it is not installed.
    """
    return import_optional("openvino", TargetError, what="this peer", extra=EXTRA)


def open_model(model: Path, threads: int, precision: str) -> Run:
    """Compile an ONNX file, or an OpenVINO file (.xml), for the CPU.

    Args:
        precision: type of everything that is not quantized: "f32" or "bf16".

    Raises:
        TargetError: OpenVINO is not installed, or does not take the model.
    """
    openvino = import_openvino()
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    try:
        compiled = core.compile_model(str(model), "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise TargetError(f"OpenVINO cannot take this model ({reason})", hint="leave this peer out") from error
    names = [output.get_any_name() for output in compiled.outputs]
    request = compiled.create_infer_request()

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = request.infer(dict(feeds))
        return {name: outputs[i] for i, name in enumerate(names)}

    return run
