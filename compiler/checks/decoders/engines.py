"""The engines that a decoder is timed beside, by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.checks.decoders.genai import PACKAGE, genai_model
from trimtab.compiler.checks.decoders.timing import Start
from trimtab.compiler.sources.gguf import is_gguf
from trimtab.passes.errors import TargetError
from trimtab.passes.optional import require_packages
from trimtab.passes.os_errors import no_file

GENAI, LLAMA = "genai-int4", "llama.cpp"

_IMPORT_S = 60.0  # time limit of an import

DECODER_PEERS = (GENAI, LLAMA)
"""Names of peers that time decoders alone."""


@dataclass(frozen=True)
class OtherEngines:
    """The models of peers that do not start from the dense ONNX file.

    Attributes:
        origin: the model that was compiled: a Hugging Face directory, a GGUF file, or another.
        gguf: the GGUF file for llama.cpp; None takes `origin`, if that is a GGUF file.
        llama_python: an interpreter that has llama-cpp-python; None takes the running one.
    """

    origin: Path
    gguf: Path | None = None
    llama_python: Path | None = None

    def check(self, names: Sequence[str], batch: int) -> None:
        """Refuse peers that cannot be started, before minutes of work.

        Raises:
            TargetError: a package, the file or the interpreter is missing, or the batch is not 1.
        """
        if names and batch != 1:
            raise TargetError(
                f"peer {names[0]!r} is timed one text at a time, not {batch}", hint="give --shapes, such as 1x128"
            )
        if LLAMA not in names and (self.gguf is not None or self.llama_python is not None):
            raise TargetError("--gguf and --llama-python are options of the peer llama.cpp", hint=f"add --peer {LLAMA}")
        if GENAI in names:
            require_packages([PACKAGE], TargetError, what=f"peer {GENAI!r}", extra="peers")
            if not self.origin.exists():
                raise TargetError(f"peer {GENAI!r} starts from {self.origin}, which is gone", hint="put it back")
        if LLAMA in names:
            self._llama_file()
            if not self._python.is_file():
                raise TargetError(f"--llama-python: there is no file {self.llama_python}", hint="give an interpreter")
            if not _imports(self._python, "llama_cpp"):
                raise TargetError(
                    f"peer {LLAMA!r}: {self._python} does not import llama_cpp",
                    hint="python -m venv llama && llama/bin/pip install llama-cpp-python, "
                    "then --llama-python llama/bin/python",
                )

    def start(self, name: str) -> Start:
        """The way to start the peer `name`."""
        if name == GENAI:
            return Start(sys.executable, "genai_steps.py", genai_model(self.origin))
        return Start(self._python, "llama_steps.py", self._llama_file())

    @property
    def _python(self) -> Path:
        return Path(sys.executable) if self.llama_python is None else self.llama_python.absolute()

    def _llama_file(self) -> Path:
        if self.gguf is not None:
            if not self.gguf.is_file():
                raise no_file(self.gguf, TargetError, hint="give a GGUF file of the same model")
            if not is_gguf(self.gguf):
                raise TargetError(f"--gguf: {self.gguf} is no GGUF file", hint="give a file that ends in .gguf")
            return self.gguf
        if self.origin.suffix == ".gguf" and not self.origin.exists():
            raise TargetError(f"peer {LLAMA!r} starts from {self.origin}, which is gone", hint="give it: --gguf FILE")
        if not is_gguf(self.origin):
            raise TargetError(
                f"peer {LLAMA!r} starts from a GGUF file, and this build was made of {self.origin}",
                hint="give the same model as a file: --gguf FILE",
            )
        return self.origin


def _imports(python: Path, module: str) -> bool:
    command = [str(python), "-c", f"import {module}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=_IMPORT_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
