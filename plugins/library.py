"""The native kernels: where the library lies, and how a session gets it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

log = logging.getLogger(__name__)

NAME = "trimtab_ops"
_SUFFIXES = (".so", ".dll", ".dylib")


def library_path() -> Path | None:
    """The library, as installed with the package; or what TRIMTAB_OPS_LIBRARY says. None where there is none."""
    told = os.environ.get("TRIMTAB_OPS_LIBRARY")
    if told is not None:
        return Path(told) if Path(told).is_file() else None
    beside = [Path(__file__).parent / f"{NAME}{suffix}" for suffix in _SUFFIXES]
    try:  # of an editable install, compiled files lie apart from the sources
        files = importlib.metadata.files("trimtab") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(str(f.locate())) for f in files if f.name in {path.name for path in beside}]
    return next((path for path in (*beside, *installed) if path.is_file()), None)


@lru_cache
def instruction_set() -> str | None:
    """Of the kernels here: "portable", "avx2", "avx_vnni", "avx512" or "avx512_vnni"; None without the library."""
    return _answer("trimtab_isa")


@lru_cache
def kernels() -> frozenset[str]:
    """Ops that the library has a kernel of; those of a later checkout than it was compiled from are missing."""
    names = _answer("trimtab_kernels")
    return frozenset(names.split(",")) if names else frozenset()


def _answer(name: str) -> str | None:
    """What a function of the library without arguments returns; None where either is missing."""
    path = library_path()
    if path is None:
        return None
    try:
        function = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        log.debug("%s: %s", path, error)
        return None
    function.restype = ctypes.c_char_p
    return str(function().decode())


def register(options: ort.SessionOptions) -> bool:
    """Give a session the native kernels. Without them it runs the reference bodies: the same numbers, far slower.

    Returns:
        whether it has them; a warning says why not.
    """
    path = library_path()
    if path is None:
        _warn("the library of native kernels is missing; install trimtab where there is a C++ compiler")
        return False
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        _warn(f"{path}: this onnxruntime does not take the library ({error})")
        return False
    return True


@lru_cache
def _warn(what: str) -> None:
    log.warning("%s: the dialect's ops run as standard ops, several times slower than they could", what)
