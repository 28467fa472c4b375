"""Torch module → ONNX file, by torch's dynamo exporter. The only road from torch: Hugging Face models take it too."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.passes.errors import ModelError

OPSET = 23
_IN_TURNS = threading.RLock()


def export_module(
    module: torch.nn.Module,
    args: Sequence[Any],
    path: Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write `module` to `path`, with its weights in `<name>.data` beside it. The module keeps its modes.

    Args:
        args, kwargs: example inputs. Dynamic dimensions need a size of 2 or more: torch bakes in 0 and 1.
        dynamic_shapes: as torch.onnx.export takes it, such as ({0: "batch", 1: "tokens"},); strings name dimensions.

    Raises:
        ModelError: a parameter is NaN or infinite, or torch cannot export the module; says why.
    """
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ModelError(
                f"weight {name!r}: has values that are NaN or infinite",
                hint="the model is damaged or its training diverged; use a sound checkpoint",
            )
    training = {part: part.training for part in module.modules()}  # parts may differ from the whole
    module.eval()
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(args),
                kwargs=dict(kwargs or {}),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
            assert program is not None  # it is None only for the old exporter
            program.save(path, external_data=True)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        first = str(cause).strip().splitlines()
        raise ModelError(
            f"{type(module).__name__}: torch cannot export it ({type(cause).__name__}: {first[0] if first else ''})",
            hint="see that torch.export.export takes the module with these inputs",
        ) from error
    finally:
        for part, mode in training.items():
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on itself from the user: a failure raises, and that is all they need.

    Threads export in turns: levels and warning filters belong to the process, and another thread would put them back as
    it found them, changed.
    """
    with _IN_TURNS:
        loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
