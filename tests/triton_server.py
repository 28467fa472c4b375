"""The real tritonserver for tests, made once for all runs in the user's cache, and models for it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import zoo
from filelock import FileLock

from trimtab.compiler.serving import environment
from trimtab.compiler.serving.find import VARIABLE, TritonServer, find_server
from trimtab.passes.errors import TargetError


def cache() -> Path:
    """Where the server's environment is kept, as TRIMTAB_CACHE names it; the tests' own cache ends with each run."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "trimtab-tests" / "server"


def server(patch: pytest.MonkeyPatch) -> TritonServer:
    """The server that trimtab installs; skips the test where it cannot be installed."""
    pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    patch.delenv(VARIABLE, raising=False)
    patch.setenv("TRIMTAB_CACHE", str(folder))
    refused = folder / f"refused-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    with FileLock(folder / "tests.lock"):  # two workers: the second need not try again what the first could not
        if refused.is_file():
            pytest.skip(refused.read_text())
        try:
            if environment.installed() is None:
                environment.install()
        except TargetError as error:
            refused.write_text(f"no tritonserver here: {error.message.splitlines()[0]}")
            pytest.skip(refused.read_text())
    return find_server()


def exported(family: str, folder: Path) -> Path:
    """The ONNX file of a tiny model with its tokenizer and configuration beside it; exported once for all runs."""
    found = zoo.exported(family, "cached" if family in zoo.DECODERS else "dynamo")
    zoo.save_pretrained(family, folder)
    (folder / "model.safetensors").unlink()
    shutil.copytree(found.parent, folder, dirs_exist_ok=True)
    return folder / found.name
