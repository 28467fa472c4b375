"""The error that all checks of a file raise."""

from __future__ import annotations

from trimtab.passes.errors import ModelError, quoted


class MalformedError(Exception):
    """A fault of an ONNX file, in words; `check_model` adds the name of the file."""


def name_of(value: str) -> str:
    """A name from the file, short enough for a message."""
    return quoted(value)


def refused(where: str, fault: MalformedError) -> ModelError:
    """The error for the user."""
    return ModelError(
        f"{where}: not a well-formed ONNX graph: {fault}", hint="export the model again, or repair it with its exporter"
    )
