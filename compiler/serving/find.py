"""Which tritonserver: one that is named, one on PATH, or the one that trimtab installs."""

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
        binary: of it.
        backends: folder of its backends.
        env: variables that it needs besides ours.
    """

    binary: Path
    backends: Path
    env: dict[str, str] = field(default_factory=dict)

    def has(self, backend: str) -> bool:
        """Whether `backend` is installed in it."""
        return (self.backends / backend).is_dir()


def find_server(progress: Progress | None = None) -> TritonServer:
    """$TRIMTAB_TRITONSERVER, else what is on PATH, else trimtab's own, which is installed if it has to be.

    Raises:
        TargetError: the one that is named is no server, or none can be installed.
    """
    named = os.environ.get(VARIABLE)
    if named and not (Path(named).is_file() and os.access(named, os.X_OK)):
        raise TargetError(f"{VARIABLE}: {named} is no program", hint="name the file tritonserver, or unset it")
    found = named or shutil.which("tritonserver")
    if found:
        binary = Path(found).resolve()
        return TritonServer(binary, binary.parents[1] / "backends")
    folder = environment.installed() or environment.install(progress)
    binary = environment.binary(folder)
    return TritonServer(binary, binary.parents[1] / "backends", environment.variables(folder))
