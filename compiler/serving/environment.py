"""A tritonserver without a container: NVIDIA's package nvidia-pytriton, in a virtual environment of its own.

The package carries the server (CPU, Python backend). Its backend returns garbage under numpy 2, which trimtab itself
runs with, hence an environment apart. It is made once, in trimtab's cache.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimtab.compiler.cache import cache_dir, entry, is_sound
from trimtab.compiler.processes import end_with_parent, ending, tail
from trimtab.compiler.progress import Progress
from trimtab.passes.errors import TargetError
from trimtab.passes.temporary import temporary_folder

log = logging.getLogger(__name__)

SERVER = "nvidia-pytriton==0.7.0"
_NUMPY = "numpy==1.26.4"
_LIKE_OURS = ("onnxruntime", "tokenizers", "pydantic")
"""Packages that the repository's Python models import, in the versions that trimtab runs with."""

_INSTALL_S = 1800.0
_STUB = "triton_python_backend_stub"


def requirements() -> list[str]:
    """What is installed, besides the server, whose own dependencies are for its Python interface."""
    return [_NUMPY, *(f"{name}=={_version(name)}" for name in _LIKE_OURS)]


def _version(name: str) -> str:
    """The one that is installed here, where ONNX Runtime may be the package for GPUs; the server's is for CPUs."""
    try:
        return version(name)
    except PackageNotFoundError:
        return version(f"{name}-gpu")


def installed() -> Path | None:
    """The environment, if it was made and every file in it is as it was written."""
    folder = _folder()
    return folder if is_sound(folder) else None


def install(progress: Progress | None = None) -> Path:
    """The environment, made if it is missing or damaged: some 400 MB, in half a minute where the network is fast.

    Raises:
        TargetError: pip or the interpreter's shared library is missing, or pip fails; shows the end of its log.
        BuildError: the cache cannot be written.
    """
    report = progress or (lambda what, done, total: None)
    folder = _folder()
    what = f"installing tritonserver into {folder} (once)"

    def make(part: Path) -> None:
        _python_library()
        report(what, 0, 3)
        _run([sys.executable, "-m", "venv", "--without-pip", str(part)], part)
        for done, packages in enumerate((("--no-deps", SERVER), requirements()), 1):
            report(what, done, 3)
            _run(
                [sys.executable, "-m", "pip", "--python", str(_python(part)), "install", "--no-input",
                 "--disable-pip-version-check", "--only-binary=:all:", *packages],
                part,
            )  # fmt: skip
        _lay_out_backends(part)
        report(what, 3, 3)

    return entry(folder.parent.name, folder.name, make)


def binary(folder: Path) -> Path:
    """tritonserver in the environment `folder`."""
    return _packages(folder) / "pytriton" / "tritonserver" / "bin" / "tritonserver"


def variables(folder: Path) -> dict[str, str]:
    """Environment variables that the server of the environment `folder` needs: its stub finds Python by PATH."""
    libraries = [str(_python_library().parent), str(_packages(folder) / "nvidia_pytriton.libs")]
    if os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(os.environ["LD_LIBRARY_PATH"])
    return {
        "PATH": f"{_python(folder).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONDONTWRITEBYTECODE": "1",  # every file in the environment is one that was installed
    }


def _folder() -> Path:
    """By what lies in it, so that another version of trimtab, its packages or Python makes another."""
    wanted = "\n".join([SERVER, *requirements(), sys.version, sys.prefix, "1"])
    return cache_dir() / "tritonserver" / hashlib.sha256(wanted.encode()).hexdigest()[:16]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python3"


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _python_library() -> Path:
    """The interpreter as a shared library, which the stub of the Python backend is linked against.

    Raises:
        TargetError: this Python has none.
    """
    name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib")]
    folders.append(os.path.join(str(folders[0]), str(sysconfig.get_config_var("MULTIARCH"))))
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    raise TargetError(
        f"{name}: not found beside {sys.executable}, and Triton's Python backend needs it",
        hint=f"install a Python with its shared library (Debian: libpython3.{sys.version_info.minor}), or give a "
        "server of your own with TRIMTAB_TRITONSERVER",
    )


def _lay_out_backends(folder: Path) -> None:
    """Put the stub for this Python beside the Python backend, where the server looks for it."""
    server = _packages(folder) / "pytriton" / "tritonserver"
    stubs = server / "python_backend_stubs"
    stub = stubs / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not stub.is_file():
        known = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda name: int(name.split(".")[-1])))
        raise TargetError(
            f"{SERVER} has no stub for Python {sys.version_info.major}.{sys.version_info.minor} (it has {known})",
            hint="run trimtab with one of those, or give a server of your own with TRIMTAB_TRITONSERVER",
        )
    shutil.copy(stub, server / "backends" / "python" / _STUB)


def _run(command: list[str], folder: Path) -> None:
    """Run a step of the installation; constraints are those of trimtab's environment, so pip must not see them."""
    env = {key: value for key, value in os.environ.items() if key not in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with temporary_folder("install") as scratch:
        output = scratch / "log.txt"
        try:
            with output.open("wb") as file:
                code = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env, check=False,
                    timeout=_INSTALL_S, preexec_fn=end_with_parent(),
                ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"gave up installing tritonserver after {_INSTALL_S:g} s{tail(output)}") from error
        log.debug("%s: %.1f s", " ".join(command), time.monotonic() - start)
        if code:
            how = ending(code)
            raise TargetError(
                f"tritonserver could not be installed: the installation {how.words}{tail(output)}",
                hint=how.hint
                or "it comes from PyPI as nvidia-pytriton (Linux x86-64, aarch64); see that pip reaches it, or give "
                "a server of your own with TRIMTAB_TRITONSERVER",
            )
