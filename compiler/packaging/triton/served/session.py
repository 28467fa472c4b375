"""The session of a packaged ONNX file, under the options that its build runs with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

MODEL = "model.onnx"


def open_session(folder: Path, told: Mapping[str, Any], device: str) -> ort.InferenceSession:
    """Open the ONNX file in `folder`: `model.onnx`, or with external data a folder of that name around it.

    Args:
        told: "threads" (0: one per core), "entries" of the session's configuration, "providers", and the "library" of
            native kernels beside the model, or None.
        device: number of the GPU, "model_instance_device_id" of the instance; Triton puts one set on each.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = told["threads"]
    options.inter_op_num_threads = 1
    for key, value in told["entries"].items():
        options.add_session_config_entry(key, value)
    if told["library"] is not None:
        options.register_custom_ops_library(str(folder / told["library"]))
    model = folder / MODEL
    model = model / MODEL if model.is_dir() else model
    own = {"CUDAExecutionProvider": {"device_id": device}}
    return ort.InferenceSession(
        str(model), options, providers=[(name, own.get(name, {})) for name in told["providers"]]
    )
