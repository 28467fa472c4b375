"""The Profile: all that passes may know about the data. One safetensors file, with the model's fingerprint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trimtab.passes.errors import ProfileError
from trimtab.passes.os_errors import check_readable, no_file, reason, remedy
from trimtab.passes.profile_schema import check_tensors

FORMAT = 1
PROFILE = "profile.safetensors"
"""Name of the Profile in the folder of its model, and in a build."""


class ProfileInfo(BaseModel):
    """Metadata of a Profile.

    Attributes:
        model: fingerprint of the model's weights (`model_fingerprint`).
        data: sha256 of the calibration data.
        samples, tokens: amount of calibration data used.
        versions: versions of the packages that wrote the Profile.
        learned: records of `trimtab train`, method → its settings and results.
        choices: stored results of passes' searches, passes and options → choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    model: str
    data: str
    samples: int
    tokens: int
    versions: dict[str, str] = {}
    learned: dict[str, dict[str, object]] = {}
    choices: dict[str, Any] = {}


@dataclass(frozen=True)
class FFNStats:
    """Statistics of one FFN over the calibration tokens.

    Attributes:
        tokens: number of tokens seen, T.
        abs_sum: Σ_t |h_tj|, [d_ff], float64, of the hidden activations h = act(x W_up) (· x W_up when gated).
        sum: Σ_t h_tj, [d_ff].
        square_sum: Σ_t h_tj², [d_ff].
        states: a uniform random sample of the FFN's inputs x, [n, d_model], float32; n is constant in T.
    """

    tokens: int
    abs_sum: np.ndarray
    sum: np.ndarray
    square_sum: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class Received:
    """Attention that tokens receive in one layer, for a uniform random sample of tokens, the same in every layer.

    Attributes:
        values: attention that each token receives, the mean over heads and the queries of its text without padding,
            [n], float32. The values of one text add up to 1, so their mean is 1 / length.
        lengths: length of the token's text without padding, [n].
        positions: position of the token in its text, from 0, [n].
    """

    values: np.ndarray
    lengths: np.ndarray
    positions: np.ndarray


@dataclass
class Profile:
    """Statistics and learned tensors of one model on one data set.

    Tensors are named `ffn.<layer>.<statistic>`, `head.states`, `attention.<layer>.received`, `.lengths` and
    `.positions`, and `learned.<method>.<initializer>`.
    """

    info: ProfileInfo
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def ffn(self, layer: int, d_ff: int, d_model: int) -> FFNStats:
        """Statistics of FFN number `layer`.

        Raises:
            ProfileError: the Profile has no statistics of the FFN, or they have other sizes than the model's.
        """
        prefix = f"ffn.{layer}."
        if prefix + "states" not in self.tensors:
            raise ProfileError(
                f"layer {layer} FFN: the profile has no statistics of it", hint="calibrate this model again"
            )
        get = {key: self.tensors[prefix + key] for key in ("tokens", "abs_sum", "sum", "square_sum", "states")}
        for what, have, want in (
            ("neurons", len(get["abs_sum"]), d_ff), ("inputs", get["states"].shape[1], d_model),
        ):  # fmt: skip
            if have != want:
                raise ProfileError(
                    f"layer {layer} FFN: profile has {have} {what}, model has {want}", hint="calibrate this model again"
                )
        return FFNStats(int(get["tokens"]), get["abs_sum"], get["sum"], get["square_sum"], get["states"])

    def states(self, layer: int) -> np.ndarray:
        """A sample of the inputs of FFN number `layer`, [n, d_model]; no rows if the Profile has none."""
        return self.tensors.get(f"ffn.{layer}.states", np.zeros((0, 0), np.float32))

    def set_ffn(self, layer: int, stats: FFNStats) -> None:
        prefix = f"ffn.{layer}."
        self.tensors[prefix + "tokens"] = np.array(stats.tokens, np.int64)
        for key in ("abs_sum", "sum", "square_sum", "states"):
            self.tensors[prefix + key] = getattr(stats, key)

    def head(self, d_model: int) -> np.ndarray:
        """A sample of the vocabulary head's inputs, [n, d_model].

        Raises:
            ProfileError: the Profile has no such sample, or the sample has another width than the model.
        """
        states = self.tensors.get("head.states")
        if states is None or len(states) < 2:
            raise ProfileError("the profile has no states of the head", hint="calibrate this model again")
        if states.shape[1] != d_model:
            raise ProfileError(
                f"head: profile has {states.shape[1]} inputs, model has {d_model}", hint="calibrate this model again"
            )
        return states

    def set_head(self, states: np.ndarray) -> None:
        self.tensors["head.states"] = states

    def received(self, layer: int) -> Received:
        """The attention that tokens receive in attention number `layer`.

        Raises:
            ProfileError: the Profile has no such sample.
        """
        prefix = f"attention.{layer}."
        if prefix + "received" not in self.tensors:
            raise ProfileError(
                f"layer {layer} attention: the profile does not have what its tokens receive",
                hint="calibrate this model again, for the passes of this recipe",
            )
        return Received(*(self.tensors[prefix + key] for key in ("received", "lengths", "positions")))

    def set_received(self, layer: int, received: Received) -> None:
        prefix = f"attention.{layer}."
        self.tensors[prefix + "received"] = received.values
        self.tensors[prefix + "lengths"], self.tensors[prefix + "positions"] = received.lengths, received.positions

    def learned(self, method: str) -> Mapping[str, np.ndarray]:
        """The weights that `method` learned, initializer name → values."""
        prefix = f"learned.{method}."
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}

    def check(self, fingerprint: str, where: str = "the profile") -> None:
        """Refuse a Profile of another model, with tensors of the wrong type or shape, or with NaN or Inf.

        Args:
            fingerprint: `model_fingerprint` of the model.
            where: name of the Profile in the message.

        Raises:
            ProfileError: names the fault.
        """
        self.check_values(where)
        if fingerprint != self.info.model:
            raise ProfileError(
                f"{where} belongs to another model (weights {self.info.model[:12]}, this model {fingerprint[:12]})",
                hint="calibrate this model, or give the profile that was made from it",
            )

    def check_values(self, where: str = "the profile") -> None:
        """Refuse tensors that passes cannot read, and NaN and Inf, from which passes would compute wrong weights.

        Args:
            where: name of the Profile in the message.

        Raises:
            ProfileError: names the first such tensor.
        """
        self.check_finite(where)
        check_tensors(self.tensors, where)

    def check_finite(self, where: str = "the profile") -> None:
        """Refuse NaN and Inf, from which passes would compute wrong weights.

        Args:
            where: name of the Profile in the message.

        Raises:
            ProfileError: names the first tensor with NaN or Inf.
        """
        for name, value in self.tensors.items():
            array = np.asarray(value)
            if array.dtype.kind in "biu":
                continue
            bad = int(array.size - np.count_nonzero(np.isfinite(array)))
            if bad:
                raise ProfileError(
                    f"{where}: {bad} of the {array.size} values of {name!r} are NaN or infinite",
                    hint="make the profile again, with data that the model gives finite answers to",
                )

    def save(self, path: Path | str) -> None:
        """Write the file atomically.

        Raises:
            ProfileError: a tensor holds NaN or Inf, the folder is missing or not writable, or the disk is full.
        """
        path = Path(path)
        self.check_finite(str(path))
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        tensors = {name: np.asarray(value, order="C") for name, value in self.tensors.items()}
        try:
            part.touch()
            mode = part.stat().st_mode  # safetensors 0.8 writes files that only their owner may read
            save_file(tensors, part, metadata={"trimtab": self.info.model_dump_json()})
            part.chmod(mode)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            refused = error if isinstance(error, OSError) else _system_error(error)
            why, hint = (reason(refused), remedy(refused, path.parent)) if refused else (_reason(error), None)
            raise ProfileError(f"{path}: cannot write the profile ({why})", hint=hint) from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """Read a Profile.

        Raises:
            ProfileError: the file is missing, damaged, no Profile or of a newer format, or has tensors of the wrong
                type or shape, or with NaN or Inf.
        """
        with _opened(Path(path)) as (info, file):
            profile = cls(info, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        profile.check_values(str(path))
        return profile


def read_info(path: Path | str) -> ProfileInfo:
    """The metadata of the Profile in a file. Tensors are not read.

    Raises:
        ProfileError: as `Profile.load`.
    """
    with _opened(Path(path)) as (info, _):
        return info


@contextmanager
def _opened(path: Path) -> Iterator[tuple[ProfileInfo, Any]]:
    """Open the file of a Profile, to read tensors from it."""
    if not path.is_file():
        raise no_file(path, ProfileError, "profile", hint="make one with `trimtab calibrate`")
    check_readable(path, ProfileError)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("trimtab")
            if text is None:
                raise ProfileError(
                    f"{path}: a safetensors file, but not a trimtab profile", hint="make one with `trimtab calibrate`"
                )
            metadata = json.loads(text)
            if isinstance(metadata, dict) and metadata.get("format") != FORMAT:
                raise ProfileError(f"{path}: of another trimtab version", hint="calibrate this model again")
            yield ProfileInfo.model_validate_json(text), file
    except (SafetensorError, ValidationError, ValueError, RecursionError, OSError) as error:
        raise ProfileError(f"{path}: damaged, or not a profile ({_reason(error)})", hint="calibrate again") from error


def _system_error(error: SafetensorError) -> OSError | None:
    """The operating system's error behind one of safetensors, whose text ends with its number."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _reason(error: Exception) -> str:
    """What is wrong with a file, without a library's type names."""
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    if isinstance(error, json.JSONDecodeError | RecursionError):
        return "its metadata are no JSON"
    return str(error)
