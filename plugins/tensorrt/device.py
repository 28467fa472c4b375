"""The GPU of this machine, asked of its driver."""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache

__all__ = ["capability", "cuda_version"]

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

_WHERE = "engines with plugins are built on the machine whose GPU they are for"


@lru_cache
def capability(device: int = 0) -> int:
    """Compute capability, major and minor: 90 is 9.0.

    Raises:
        RuntimeError: there is no driver or no such GPU.
    """
    driver = _driver()
    if driver is None:
        raise RuntimeError(f"the NVIDIA driver's library is missing; {_WHERE}")
    if code := driver.cuInit(0):
        raise RuntimeError(f"the NVIDIA driver finds no GPU (cuInit: error {code}); {_WHERE}")
    found = [ctypes.c_int() for _ in (_MAJOR, _MINOR)]
    for value, attribute in zip(found, (_MAJOR, _MINOR), strict=True):
        if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            raise RuntimeError(f"the NVIDIA driver does not know GPU {device} (error {code})")
    return found[0].value * 10 + found[1].value


@lru_cache
def cuda_version() -> str | None:
    """The newest CUDA that the driver supports, such as "12.8"; None without a driver."""
    driver, version = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(ctypes.util.find_library("cuda") or "libcuda.so.1")
    except OSError:
        return None
