"""What the models share that run in Triton's Python backend."""

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
"""What the packager tells the model; it lies beside its code."""


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the version that Triton loads, of `initialize`'s arguments."""
    return Path(args["model_repository"]) / args["model_version"]


def settings(args: Mapping[str, str]) -> dict[str, Any]:
    """What `SETTINGS` says."""
    found: dict[str, Any] = json.loads((version_folder(args) / SETTINGS).read_text(encoding="utf-8"))
    return found


def read_dials(told: Mapping[str, Any]) -> Dials:
    """The dials of `told`, which is `Dials` as JSON."""
    return Dials(tuple(Dial(**dial) for dial in told["dials"]), tuple(SpeedPoint(**point) for point in told["path"]))


class Limits(NamedTuple):
    """What the inputs of an engine are checked by, as `compiler.inputs.check_inputs` takes it."""

    inputs: list[Any]
    packed: list[Packed]
    positions: Positions | None


def read_limits(told: Mapping[str, Any]) -> Limits:
    """The limits of `told`, which the packager writes as JSON."""
    inputs = [SimpleNamespace(**tensor) for tensor in told["inputs"]]
    positions = told["positions"]
    return Limits(inputs, [Packed(**mask) for mask in told["packed"]], Positions(**positions) if positions else None)


def turned(request: Any, dials: Dials, batch: int, spell: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    """The dials of a request, [batch] each: by "speed", by an input for each of them, or their defaults.

    Args:
        spell: makes the name of an input of that of a dial.

    Raises:
        InputError: a value that a dial does not take.
    """
    names = ("speed", *(dial.name for dial in dials.dials)) if dials.dials else ()
    tensors = {name: pb.get_input_tensor_by_name(request, spell(name)) for name in names}
    asked = {name: tensor.as_numpy().reshape(-1) for name, tensor in tensors.items() if tensor is not None}
    speed = asked.pop("speed", None)
    return dials.feeds(batch, asked, speed)


def together(turned: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The dials of requests that are run in one batch, each [samples of all]."""
    return {name: np.concatenate([each[name] for each in turned]) for name in turned[0]}


def texts(request: Any, name: str) -> list[str]:
    """The strings of the input `name`, [batch, 1].

    Raises:
        InputError: one is not UTF-8.
    """
    found = pb.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)
    try:
        return [text.decode("utf-8") if isinstance(text, bytes) else str(text) for text in found]
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error})") from error


def strings(name: str, values: list[str]) -> Any:
    """An output of strings, [batch, 1]."""
    return pb.Tensor(name, np.array([value.encode("utf-8") for value in values], object)[:, None])


def refusal(error: Exception) -> Any:
    """The response to a request that failed: one line, and the hint where there is one.

    A request at fault gets the status of one (HTTP 400, gRPC INVALID_ARGUMENT), anything else that of a server's fault
    (500, INTERNAL), so that clients and balancers know whether to send it again.
    """
    said, by_client = str(error), isinstance(error, InputError)
    if not isinstance(error, TrimtabError):
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, exceptions()):
            found = explain(error)
            said, by_client = f"the engine could not run: {found.words}", found.by_inputs
    code = pb.TritonError.INVALID_ARG if by_client else pb.TritonError.INTERNAL
    return pb.InferenceResponse(error=pb.TritonError(" ".join(said.split()), code))
