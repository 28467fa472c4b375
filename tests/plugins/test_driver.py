"""What CUDA's driver is asked, with stand-ins for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.plugins import driver
from trimtab.plugins.tensorrt.kernels import this_gpu


def stand_in(code: int, count: int) -> Any:
    """A driver that answers `code` when asked to start, with `count` GPUs of compute capability 12.0."""

    def put(value: Any, number: int) -> int:
        value._obj.value = number
        return 0

    return lambda name: SimpleNamespace(
        cuInit=lambda flags: code,
        cuDeviceGetCount=lambda found: put(found, count),
        cuDeviceGet=put,
        cuDeviceGetAttribute=lambda found, attribute, device: put(found, {75: 12, 76: 0}[attribute]),
    )


def _no_library(name: str) -> None:
    raise OSError(f"{name}: no such file")


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """What the driver said is forgotten, before and after."""
    answers = (driver.driver, driver.absent, driver.compute_capability)
    for answer in answers:
        answer.cache_clear()
    yield
    for answer in answers:
        answer.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", _no_library)
    assert not driver.gpu_present() and driver.compute_capability() is None and driver.cuda_version() is None
    with pytest.raises(RuntimeError, match=r"driver's library is missing.*built on the machine whose GPU"):
        this_gpu()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(("code", "count", "reason"), [(100, 0, r"no GPU \(error 100\)"), (0, 0, "no GPU$")])
def test_a_driver_without_a_gpu(code: int, count: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", stand_in(code, count))
    assert re.search(reason, driver.absent() or "") and driver.compute_capability() is None


@pytest.mark.usefixtures("asked_anew")
def test_a_driver_tells_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.ctypes, "CDLL", stand_in(0, 1))
    assert driver.absent() is None and driver.compute_capability() == "12.0"
    assert this_gpu() == 120
