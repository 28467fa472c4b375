"""Surroundings of every test: no network, a cache of its own, one thread, and the evaluation data where present."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share few cores
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; children would ignore Ctrl-C likewise
    signal.signal(signal.SIGINT, signal.default_int_handler)
_OWNER = "PYTEST_XDIST_WORKER" not in os.environ
if _OWNER:  # workers inherit it, so that an export is made once
    os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(prefix="trimtab-test-cache-")


def pytest_unconfigure() -> None:
    if _OWNER:
        shutil.rmtree(os.environ["TRIMTAB_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SHARED.is_dir():
        skip = pytest.mark.skip(reason=f"evaluation data is absent ({SHARED})")
        for item in items:
            if item.get_closest_marker("shared"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with evaluation data and checkpoints; tests that use it are marked `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"evaluation data is absent ({SHARED})")
    return SHARED
