"""Types and shapes of a Profile's tensors, by name. A Profile is read from a file that anyone may have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from trimtab.passes.errors import ProfileError, quoted


@dataclass(frozen=True)
class _Form:
    """Required type and shape of one tensor.

    Attributes:
        kinds: numpy's letters of the allowed types.
        shape: names of the axes.
        least: smallest allowed value.
    """

    kinds: str
    shape: tuple[str, ...]
    least: float = -np.inf


_FLOATS, _COUNTS = "f", "iu"
_FORMS = {
    "ffn": {
        "tokens": _Form(_COUNTS, (), 0),
        "abs_sum": _Form(_FLOATS, ("d_ff",), 0),
        "sum": _Form(_FLOATS, ("d_ff",)),
        "square_sum": _Form(_FLOATS, ("d_ff",), 0),
        "states": _Form(_FLOATS, ("n", "d_model")),
    },
    "attention": {
        "received": _Form(_FLOATS, ("n",), 0),
        "lengths": _Form(_FLOATS + _COUNTS, ("n",), 0),
        "positions": _Form(_FLOATS + _COUNTS, ("n",), 0),
    },
    "head": {"states": _Form(_FLOATS, ("n", "d_model"))},
}
"""Part of the Profile → its statistics. A layer has all statistics of its part, and axes of one name have one size."""

_NAME = re.compile(r"(?:(ffn|attention)\.(\d{1,6})|(head))\.(\w+)")


def check_tensors(tensors: Mapping[str, np.ndarray], where: str) -> None:
    """Check that all statistics have the types and shapes that passes read, and that no layer lacks one.

    Learned tensors may be any numbers. The passes that read them check them against the model.

    Args:
        where: name of the Profile in messages.

    Raises:
        ProfileError: names the tensor, and its actual and required form.
    """
    for fault in _faults(tensors):
        raise ProfileError(f"{where}: {fault}", hint="calibrate this model again")


def _faults(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    layers: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        matched = _NAME.fullmatch(name)
        if matched is not None:
            layers.setdefault((matched[1] or matched[3], matched[2] or ""), {})[matched[4]] = np.asarray(value)
        elif name.startswith("learned.") and np.asarray(value).dtype.kind not in "biuf":
            yield f"{quoted(name)} has values of type {np.asarray(value).dtype}, not numbers"
    for (part, layer), values in layers.items():
        prefix = f"{part}.{layer}" if layer else part
        sizes: dict[str, tuple[str, int]] = {}
        for key, form in _FORMS[part].items():
            name = f"{prefix}.{key}"
            if key not in values:
                yield f"{name!r} is missing, and {prefix + '.' + next(iter(values))!r} is there"
                continue
            value = values[key]
            if value.dtype.kind not in form.kinds:
                yield f"{name!r} has values of type {value.dtype}"
            elif value.ndim != len(form.shape):
                yield f"{name!r} has the shape {list(value.shape)[:8]}, not [{', '.join(form.shape)}]"
            elif value.size and not value.min() >= form.least:
                yield f"{name!r} has a value of {value.min():g}, and all are at least {form.least:g}"
            else:
                for axis, size in zip(form.shape, value.shape, strict=True):
                    other, same = sizes.setdefault(axis, (name, size))
                    if same != size:
                        yield f"{name!r} has {size} entries, and {other!r} has {same}"
