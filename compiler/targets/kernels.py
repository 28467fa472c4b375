"""Tries tiny models in ONNX Runtime: their optimised graphs, and which products of the dialect run natively."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort

from trimtab.compiler.targets import trials
from trimtab.compiler.targets.sessions import providers, session_options
from trimtab.passes.ort_errors import exceptions
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins import DOMAIN
from trimtab.plugins.library import instruction_set, library_path, register


def optimised(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, set[str]] | None:
    """Output of the trial `model`, and the op types of its optimised graph; None where ONNX Runtime refuses it."""
    with temporary_folder("kernels") as folder:
        options = session_options(1)
        if any(domain.domain == DOMAIN for domain in model.opset_import) and library_path() is not None:
            register(options)
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=providers())
            (y,) = session.run(None, {"x": x})
        except exceptions():
            return None
        return y, {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def has_kernel(op: Literal["Glu", "Int4Linear", "Int8Linear"]) -> bool:
    """Whether `op` stays one op with a native kernel: the library is there, and its kernel supports this CPU.

    The int4 kernel needs the processor's vector units: portable code is slower than MatMulNBits.
    """
    if providers() != ["CPUExecutionProvider"] or (op == "Int4Linear" and instruction_set() == "portable"):
        return False
    makers = {"Glu": (trials.glu, 2), "Int4Linear": (trials.int4_linear, 127), "Int8Linear": (trials.int8_linear, 255)}
    trial, x = makers[op]
    model, want = trial()
    result = optimised(model, np.full((1, trials.K), x, np.float32))
    return result is not None and result[1] == {op} and not np.any(result[0] != want)
