"""The choice of a tritonserver: the one that the user names, one on PATH, or the one that trimtab installs."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.compiler.progress import Progress
from trimtab.compiler.serving import environment
from trimtab.passes.errors import TargetError

VARIABLE = "TRIMTAB_TRITONSERVER"


@dataclass(frozen=True)
class TritonServer:
    """A server that can be started.

    Attributes:
        binary: its executable.
        backends: folder of its backends.
        env: environment variables that it needs besides ours.
    """

    binary: Path
    backends: Path
    env: dict[str, str] = field(default_factory=dict)

    def has(self, backend: str) -> bool:
        """Whether the server has `backend`."""
        return (self.backends / backend).is_dir()


def find_server(progress: Progress | None = None) -> TritonServer:
    """$TRIMTAB_TRITONSERVER, else the server on PATH, else trimtab's own, which is installed if necessary.

    Raises:
        TargetError: $TRIMTAB_TRITONSERVER is not a program, or no server can be installed.
    """
    named = os.environ.get(VARIABLE)
    if named and not (Path(named).is_file() and os.access(named, os.X_OK)):
        raise TargetError(f"{VARIABLE}: {named} is no program", hint="name the file tritonserver, or unset it")
    executable = named or shutil.which("tritonserver")
    if executable:
        binary = Path(executable).resolve()
        return TritonServer(binary, binary.parents[1] / "backends")
    folder = environment.installed() or environment.install(progress)
    binary = environment.binary(folder)
    return TritonServer(binary, binary.parents[1] / "backends", environment.variables(folder))
