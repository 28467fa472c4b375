"""The dense model in OpenVINO with int8 weights and activations, calibrated statically by NNCF."""

from __future__ import annotations

import io
import logging
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from trimtab.compiler.checks.peers.cached import cached_model
from trimtab.compiler.checks.peers.model import CalibrationData, PeerModel
from trimtab.compiler.checks.peers.openvino import EXTRA, import_openvino, open_model
from trimtab.compiler.feeds import Run
from trimtab.passes.errors import DataError, TargetError
from trimtab.passes.optional import import_optional


def int8(model: PeerModel, threads: int) -> Run:
    """The dense model through `nncf.quantize` for transformers; what NNCF leaves in floating point is float32.

    Raises:
        DataError: there are no data to calibrate on.
        TargetError: OpenVINO or NNCF is not installed, or does not take the model.
    """
    openvino, nncf = import_openvino(), _import_nncf()
    data = model.calibration
    if data is None:
        raise DataError(
            "openvino-int8 is calibrated statically, and there are no data",
            hint="give what the build was calibrated on: `--peer-data FILE`",
        )
    versions = f"{openvino.__version__} {nncf.__version__}"
    path = cached_model(
        "openvino-int8", model.canonical, (versions, data.key),
        lambda out: _quantize(openvino, nncf, model.canonical, data, out), "model.xml",
    )  # fmt: skip
    return open_model(path, threads, "f32")


def _quantize(openvino: Any, nncf: Any, dense: Path, data: CalibrationData, out: Path) -> None:
    feeds = list(data.feeds())
    try:
        with redirect_stdout(io.StringIO()):  # progress bars
            quantized = nncf.quantize(
                openvino.Core().read_model(dense),
                nncf.Dataset(feeds),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(feeds),
            )
    except Exception as error:  # NNCF's exceptions have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise TargetError(f"NNCF cannot quantize this model ({reason})", hint="leave openvino-int8 out") from error
    openvino.save_model(quantized, out, compress_to_fp16=False)


def _import_nncf() -> Any:
    """The module nncf, without its output on stdout and without its telemetry."""
    os.environ.setdefault("NNCF_CI", "1")  # nncf reads it at import: no telemetry
    logger_class = logging.getLoggerClass()
    try:
        nncf = import_optional("nncf", TargetError, what="the peer openvino-int8", extra=EXTRA)
    finally:
        logging.setLoggerClass(logger_class)  # nncf sets its own class for the whole process
    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf's own function also changes the logger's handlers
    return nncf
