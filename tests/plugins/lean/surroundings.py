"""NVIDIA's real layer of Python plugins, without a GPU and without TensorRT's builder: for child processes alone.

The bindings want three libraries by name; the lean runtime answers to them, and six functions of a stub to what it
lacks. Declarations meet NVIDIA's validators and the real registry then; no engine can be built.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["MissingError", "make"]

_LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


class MissingError(Exception):
    """Why it cannot be had here."""


def make(folder: Path) -> dict[str, str]:
    """Environment variables of a process that can import `tensorrt`; what they point to is made in `folder`."""
    bindings, lean = _package("tensorrt_bindings"), _package("tensorrt_lean_libs") / "libnvinfer_lean.so.11"
    if not lean.is_file():
        raise MissingError(f"{lean} is missing")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise MissingError("no C compiler")
    libraries, packages, stub = folder / "libraries", folder / "packages", folder / "libstub.so"
    for made in (libraries, packages):
        made.mkdir()
    # In site-packages, a package of this name would pass for an installed TensorRT.
    (packages / "tensorrt").symlink_to(bindings)
    for name in _LIBRARIES:
        (libraries / name).symlink_to(lean)
    source = Path(__file__).with_name("stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", stub, source], check=True, capture_output=True)
    return {
        "LD_PRELOAD": str(stub),
        "LD_LIBRARY_PATH": _before(libraries, "LD_LIBRARY_PATH"),
        "PYTHONPATH": _before(packages, "PYTHONPATH"),
    }


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MissingError(f"the package {name} is not installed (pip install 'trimtab[tensorrt-check]')")
    return Path(next(iter(found.submodule_search_locations)))


def _before(path: Path, variable: str) -> str:
    return os.pathsep.join([str(path), *filter(None, [os.environ.get(variable)])])
