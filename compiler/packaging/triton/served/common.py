"""Functions that all models in Triton's Python backend share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb

from trimtab.passes.dials import Dial, Dials, SpeedPoint
from trimtab.passes.errors import InputError, TrimtabError
from trimtab.passes.graph.limits import Packed, Positions
from trimtab.passes.ort_errors import exceptions, explain

SETTINGS = "served.json"
"""File with the model's settings, which the packager writes next to the model's code."""


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the version that Triton loads, from the arguments of `initialize`."""
    return Path(args["model_repository"]) / args["model_version"]


def read_settings(args: Mapping[str, str]) -> dict[str, Any]:
    """The content of the file `SETTINGS`."""
    settings: dict[str, Any] = json.loads((version_folder(args) / SETTINGS).read_text(encoding="utf-8"))
    return settings


def read_dials(values: Mapping[str, Any]) -> Dials:
    """`Dials` from its JSON `values`."""
    return Dials(
        tuple(Dial(**dial) for dial in values["dials"]), tuple(SpeedPoint(**point) for point in values["path"])
    )


class Limits(NamedTuple):
    """The limits of an engine's inputs: arguments of `compiler.inputs.check_inputs`."""

    inputs: list[Any]
    packed: list[Packed]
    positions: Positions | None


def read_limits(values: Mapping[str, Any]) -> Limits:
    """`Limits` from the JSON `values` that the packager writes."""
    inputs = [SimpleNamespace(**tensor) for tensor in values["inputs"]]
    positions = values["positions"]
    return Limits(inputs, [Packed(**mask) for mask in values["packed"]], Positions(**positions) if positions else None)


def request_dials(request: Any, dials: Dials, batch: int, spell: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """The dials of a request, [batch] each: from its input "speed", from the dials' own inputs, or their defaults.

    Args:
        spell: converts the name of a dial to that of its input.

    Raises:
        InputError: a dial does not take a value.
    """
    names = ("speed", *(dial.name for dial in dials.dials)) if dials.dials else ()
    tensors = {name: pb.get_input_tensor_by_name(request, spell(name)) for name in names}
    values = {name: tensor.as_numpy().reshape(-1) for name, tensor in tensors.items() if tensor is not None}
    speed = values.pop("speed", None)
    return dials.feeds(batch, values, speed)


def joined_dials(dials: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The dials of requests that run in one batch, each [samples of all requests]."""
    return {name: np.concatenate([each[name] for each in dials]) for name in dials[0]}


def texts(request: Any, name: str) -> list[str]:
    """The strings of the input `name`, [batch, 1].

    Raises:
        InputError: a string is not UTF-8.
    """
    values = pb.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
    try:
        return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in values]
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error})") from error


def strings(name: str, values: list[str]) -> Any:
    """An output tensor of strings, [batch, 1]."""
    return pb.Tensor(name, np.array([value.encode("utf-8") for value in values], object)[:, None])


def refusal(error: Exception) -> Any:
    """The response to a request that failed: one line, with the hint if there is one.

    A fault of the request gets HTTP 400 (gRPC INVALID_ARGUMENT), any other fault 500 (INTERNAL), so that clients and
    load balancers know whether to send the request again.
    """
    message, by_client = str(error), isinstance(error, InputError)
    if not isinstance(error, TrimtabError):
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, exceptions()):
            explained = explain(error)
            message, by_client = f"the engine could not run: {explained.words}", explained.by_inputs
    code = pb.TritonError.INVALID_ARG if by_client else pb.TritonError.INTERNAL
    return pb.InferenceResponse(error=pb.TritonError(" ".join(message.split()), code))
