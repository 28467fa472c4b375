"""A tritonserver without a container: NVIDIA's package nvidia-pytriton, in its own virtual environment.

The package contains the server (CPU, Python backend). Its backend returns garbage with numpy 2, which trimtab uses, so
it needs a separate environment. The environment is created once, in trimtab's cache.
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
_SAME_VERSION = ("onnxruntime", "tokenizers", "pydantic")
"""Packages that the repository's Python models import, in the versions that trimtab uses."""

_INSTALL_S = 1800.0
_STUB = "triton_python_backend_stub"


def requirements() -> list[str]:
    """Packages to install besides the server. The server's own dependencies are only for its Python interface."""
    return [_NUMPY, *(f"{name}=={_version(name)}" for name in _SAME_VERSION)]


def _version(name: str) -> str:
    """The version that is installed here. ONNX Runtime may be the package for GPUs; the server's is for CPUs."""
    try:
        return version(name)
    except PackageNotFoundError:
        return version(f"{name}-gpu")


def installed() -> Path | None:
    """The environment, if it exists and every file in it is as it was written."""
    folder = _folder()
    return folder if is_sound(folder) else None


def install(progress: Progress | None = None) -> Path:
    """The environment; created if it is missing or damaged: about 400 MB, half a minute on a fast network.

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
    """Environment variables that the server in the environment `folder` needs; its stub finds Python by PATH."""
    libraries = [str(_python_library().parent), str(_packages(folder) / "nvidia_pytriton.libs")]
    if os.environ.get("LD_LIBRARY_PATH"):
        libraries.append(os.environ["LD_LIBRARY_PATH"])
    return {
        "PATH": f"{_python(folder).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONDONTWRITEBYTECODE": "1",  # the environment contains only files that were installed
    }


def _folder() -> Path:
    """The environment's folder. Its name is a hash of its contents, so new versions get a new folder."""
    contents = "\n".join([SERVER, *requirements(), sys.version, sys.prefix, "1"])
    return cache_dir() / "tritonserver" / hashlib.sha256(contents.encode()).hexdigest()[:16]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python3"


def _packages(folder: Path) -> Path:
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _python_library() -> Path:
    """The interpreter's shared library, which the stub of the Python backend is linked against.

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
        f"{name}: not found next to {sys.executable}, and Triton's Python backend needs it",
        hint=f"install a Python with its shared library (Debian: libpython3.{sys.version_info.minor}), or give a "
        "server of your own with TRIMTAB_TRITONSERVER",
    )


def _lay_out_backends(folder: Path) -> None:
    """Copy the stub for this Python next to the Python backend, where the server searches for it."""
    server = _packages(folder) / "pytriton" / "tritonserver"
    stubs = server / "python_backend_stubs"
    stub = stubs / f"{sys.version_info.major}.{sys.version_info.minor}" / _STUB
    if not stub.is_file():
        versions = ", ".join(sorted((path.name for path in stubs.iterdir()), key=lambda name: int(name.split(".")[-1])))
        raise TargetError(
            f"{SERVER} has no stub for Python {sys.version_info.major}.{sys.version_info.minor} (it has {versions})",
            hint="run trimtab with one of these, or give a server of your own with TRIMTAB_TRITONSERVER",
        )
    shutil.copy(stub, server / "backends" / "python" / _STUB)


def _run(command: list[str], folder: Path) -> None:
    """Run a step of the installation. pip must not see the user's constraints, which are for trimtab's environment."""
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
            raise TargetError(
                f"the installation of tritonserver was stopped after {_INSTALL_S:g} s{tail(output)}",
                hint="see that the network works, or name an installed server by TRIMTAB_TRITONSERVER",
            ) from error
        log.debug("%s: %.1f s", " ".join(command), time.monotonic() - start)
        if code:
            how = ending(code)
            raise TargetError(
                f"tritonserver could not be installed: the installation {how.words}{tail(output)}",
                hint=how.hint
                or "the package nvidia-pytriton is on PyPI (Linux x86-64, aarch64); check that pip reaches it, or give "
                "a server of your own with TRIMTAB_TRITONSERVER",
            )
