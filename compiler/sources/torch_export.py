"""Torch module → ONNX file, by torch's dynamo exporter. The only road from torch: Hugging Face models take it too."""

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
"""The hint where the user has no part in what is exported, such as a checkpoint."""

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
    hint: str = "see that torch.export.export takes the module with these inputs",
) -> None:
    """Write `module` to `path`, with its weights in `<name>.data` beside it. The module keeps its modes.

    Args:
        args, kwargs: example inputs. Dynamic dimensions need a size of 2 or more: torch bakes in 0 and 1.
        dynamic_shapes: as torch.onnx.export takes it, such as ({0: "batch", 1: "tokens"},); strings name dimensions.
        name: what messages call the module; by default its class.
        hint: what the user can do where torch cannot export it.

    Raises:
        TrimtabError: the module itself raises it.
        ModelError: a parameter is NaN or infinite, or torch cannot export the module; says why.
    """
    for weight, parameter in module.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise ModelError(
                f"weight {weight!r}: has values that are NaN or infinite",
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
        log.debug("torch.onnx.export failed", exc_info=True)
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, TrimtabError):
                raise cause from None
        called = name or type(module).__name__
        raise ModelError(f"{called}: torch cannot export it: {_reason(causes)}", hint=hint) from None
    finally:
        for part, mode in training.items():
            part.training = mode


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what led to it, one behind the other."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _reason(causes: Sequence[BaseException]) -> str:
    """Why torch could not export a module, from what it raised: most of that text is about its own insides."""
    texts = [str(cause) for cause in causes]
    operator = next((match for text in texts if (match := re.search(r"target=torch\.ops\.([\w.]+)", text))), None)
    if operator is not None:
        return f"its exporter has no ONNX form of the operator {operator[1]}"
    if any("data-dependent" in text for text in texts):
        return "which operations it computes depends on the values of tensors, and a graph has to be the same for all"
    if any("inferred ranges" in text or "Constraints violated" in text for text in texts):
        return "it computes with one fixed size where a dimension has to be dynamic"
    first = " ".join(texts[min(1, len(texts) - 1)].strip().splitlines()[:1])
    return f"running it ends in {type(causes[min(1, len(causes) - 1)]).__name__} ({first[:_LINE]})"


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
