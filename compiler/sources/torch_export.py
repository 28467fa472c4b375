"""Torch module → ONNX file, with torch's dynamo exporter. Hugging Face models are exported here as well."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trimtab.passes.errors import ModelError, TrimtabError

log = logging.getLogger(__name__)

OPSET = 23
OTHER_MEANS = "export the model to ONNX by other means and give that file"
"""Hint for exports that the user cannot influence, such as those of checkpoints."""

_LINE = 200  # characters of an exception's text in messages
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
    name: str | None = None,
    hint: str = "check that torch.export.export takes the module with these inputs",
) -> None:
    """Write `module` to `path`, and its weights to `<name>.data` beside it. The module keeps its training modes.

    Args:
        args, kwargs: example inputs. Dynamic dimensions need a size of 2 or more: torch treats 0 and 1 as constants.
        dynamic_shapes: argument of torch.onnx.export, such as ({0: "batch", 1: "tokens"},); strings name dimensions.
        name: name of the module in messages; by default its class.
        hint: hint of the error if torch cannot export the module.

    Raises:
        TrimtabError: the module's forward raises it.
        ModelError: a parameter is NaN or infinite, or torch cannot export the module; says why.
    """
    for weight, parameter in module.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ModelError(
                f"weight {weight!r}: has values that are NaN or infinite",
                hint="the model is damaged or its training diverged; use a sound checkpoint",
            )
    training = {part: part.training for part in module.modules()}  # submodules may have other modes than the module
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
        log.debug("torch.onnx.export failed", exc_info=True)
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, TrimtabError):
                raise cause from None
        module_name = name or type(module).__name__
        raise ModelError(f"{module_name}: torch cannot export it: {_reason(causes)}", hint=hint) from None
    finally:
        for part, mode in training.items():
            part.training = mode


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and the chain of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(causes: Sequence[BaseException]) -> str:
    """Why torch could not export a module, extracted from its exceptions, which mostly describe torch's internals."""
    texts = [str(cause) for cause in causes]
    operator = next((match for text in texts if (match := re.search(r"target=torch\.ops\.([\w.]+)", text))), None)
    if operator is not None:
        return f"its exporter has no ONNX form of the operator {operator[1]}"
    if any("data-dependent" in text for text in texts):
        return "its control flow depends on the values of tensors, and a graph has the same operations for all values"
    if any("inferred ranges" in text or "Constraints violated" in text for text in texts):
        return "it computes with one fixed size where a dimension has to be dynamic"
    first = " ".join(texts[min(1, len(texts) - 1)].strip().splitlines()[:1])
    return f"running it ends in {type(causes[min(1, len(causes) - 1)]).__name__} ({first[:_LINE]})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's logs and warnings within the body. Failures still raise.

    Threads export in turns: log levels and warning filters belong to the process, so overlapping threads would restore
    each other's changed values.
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
