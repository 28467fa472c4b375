"""The errors that users see. Each says what is wrong, where, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

_SHOWN = 60  # characters of a text in a message
_QUOTED = 80  # limit of a file's name or value in a message, in characters


def short(text: str, limit: int = _SHOWN) -> str:
    """`text`, or its beginning if it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def quoted(name: object) -> str:
    """A name or value from a foreign file for a message, on one line and shortened."""
    return short(repr(short(name, _QUOTED) if isinstance(name, str) else name), 2 * _QUOTED)


class TrimtabError(Exception):
    """A fault in the input or the environment, not in trimtab. The CLI prints it without a traceback.

    Args:
        message: what is wrong, and where ("layer 3 FFN: profile has 1536 neurons, model has 3072").
        hint: what to do next ("calibrate this model again").
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class ModelError(TrimtabError):
    """The model cannot be read, or is not one that trimtab can compile."""


class ProfileError(TrimtabError):
    """The Profile is missing, damaged, or belongs to another model."""


class NotLearnedError(ProfileError):
    """A pass needs learned weights, and the Profile has none, or has weights learned after other passes.

    Args:
        method: method of `trimtab train` that learns the weights.
        instead: another remedy, for the hint.
        adds: whether training can add weights to the user's Profile.
    """

    def __init__(self, message: str, *, method: str, instead: str | None = None, adds: bool = True) -> None:
        super().__init__(message)
        self.method, self._instead, self._adds = method, instead, adds
        self.hint = self.remedy()

    def remedy(self, **arguments: Any) -> str:
        """The hint; `arguments` are passed to `how_to_learn`."""
        if not self._adds:
            arguments["profile"] = None
        command = how_to_learn(self.method, **arguments)
        return f"{self._instead}, or {command}" if self._instead else command


TUNED = frozenset({"lte", "magic-pyramid"})
"""Methods of `trimtab train` that also tune the model. They store the Profile in the tuned model's folder."""


def how_to_learn(
    method: str, *, model: object = "MODEL", recipe: object = "RECIPE", settings: Sequence[str] = (),
    data: object = "DATA", profile: object = None,
) -> str:  # fmt: skip
    """The commands that learn weights with `method` and compile with them.

    Args:
        settings: changes to the recipe, "pass.option=value".
        profile: the Profile that training extends; None if training calibrates by itself.
    """
    words = ["trimtab", "train", model, recipe, "--method", method]
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--data", data]
    if method in TUNED:
        command = shlex.join(map(str, [*words, "-o", "tuned"]))
        return f"run `{command}`, and compile the model `tuned`"
    words += [*(["--profile", profile] if profile is not None else []), "-o", "learned.safetensors"]
    return f"run `{shlex.join(map(str, words))}`, and compile with `--profile learned.safetensors`"


class RecipeError(TrimtabError):
    """The recipe has an unknown key or an impossible value."""


class DataError(TrimtabError):
    """Calibration or evaluation data cannot be used."""


class TargetError(TrimtabError):
    """The target is not available here, cannot take this graph, or failed to build it."""


class BuildError(TrimtabError):
    """A build directory cannot be written, is being written by another process, or is damaged."""


class InputError(TrimtabError):
    """An engine was called with inputs that it does not take."""


REPORT = "this is a fault in trimtab: please report it, with the output of `trimtab --debug ...`"


class PassError(TrimtabError):
    """A pass failed. The message names the pass and the passes that ran before.

    Args:
        name: kebab-case name of the failing pass.
        done: names of the passes that ran before, in order.
        cause: the exception of the pass.
    """

    def __init__(self, name: str, done: list[str], cause: Exception) -> None:
        before = f" (after {', '.join(done)})" if done else ""
        hint = cause.hint if isinstance(cause, TrimtabError) else REPORT
        text = cause.message if isinstance(cause, TrimtabError) else f"{type(cause).__name__}: {cause}"
        super().__init__(f"pass {name}{before}: {text}", hint=hint)
        self.pass_name = name
        self.done = done
