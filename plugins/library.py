"""The native kernels: the path of the library, and its registration with a session."""

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
    """Path of the library: TRIMTAB_OPS_LIBRARY, else the one installed with the package; None if it is missing."""
    path = os.environ.get("TRIMTAB_OPS_LIBRARY")
    if path is not None:
        return Path(path) if Path(path).is_file() else None
    beside = [Path(__file__).parent / f"{NAME}{suffix}" for suffix in _SUFFIXES]
    try:  # of an editable install, compiled files lie apart from the sources
        files = importlib.metadata.files("trimtab") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(str(f.locate())) for f in files if f.name in {path.name for path in beside}]
    return next((path for path in (*beside, *installed) if path.is_file()), None)


@lru_cache
def instruction_set() -> str | None:
    """Instruction set of the kernels: "portable", "avx2", "avx_vnni", "avx512" or "avx512_vnni"; None if missing."""
    return _answer("trimtab_isa")


@lru_cache
def kernels() -> frozenset[str]:
    """Ops with a kernel in the library. Ops newer than the library are missing."""
    names = _answer("trimtab_kernels")
    return frozenset(names.split(",")) if names else frozenset()


def _answer(name: str) -> str | None:
    """Result of a library function without arguments; None if the library or the function is missing."""
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
    """Register the native kernels with a session. Without them, it runs the reference bodies: same results, far slower.

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
