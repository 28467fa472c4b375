"""The session of a packaged ONNX file, with the same options as its build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

MODEL = "model.onnx"


def open_session(folder: Path, settings: Mapping[str, Any], device: str) -> ort.InferenceSession:
    """Open the ONNX file in `folder`: `model.onnx`, or if it has external data, `model.onnx/model.onnx`.

    Args:
        settings: "threads" (0: one per core), "entries" of the session's configuration, "providers", and the "library"
            of native kernels next to the model, or None.
        device: number of the GPU, "model_instance_device_id" of the instance; Triton starts instances on each GPU.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    for key, value in settings["entries"].items():
        options.add_session_config_entry(key, value)
    if settings["library"] is not None:
        options.register_custom_ops_library(str(folder / settings["library"]))
    model = folder / MODEL
    model = model / MODEL if model.is_dir() else model
    own = {"CUDAExecutionProvider": {"device_id": device}}
    return ort.InferenceSession(
        str(model), options, providers=[(name, own.get(name, {})) for name in settings["providers"]]
    )
