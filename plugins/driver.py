"""Finds this machine's NVIDIA GPU by CUDA's driver, since CUDA's toolkit may be missing."""

from __future__ import annotations

import ctypes
from functools import lru_cache

__all__ = ["absent", "compute_capability", "cuda_version", "driver", "gpu_present"]

_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@lru_cache
def driver() -> ctypes.CDLL | None:
    """The driver's library; None if it is not installed."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


@lru_cache
def absent() -> str | None:
    """Why no GPU can be used; None if a GPU is available."""
    library, count = driver(), ctypes.c_int()
    if library is None:
        return "the NVIDIA driver's library is missing"
    if code := library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver finds no GPU (error {code})"
    return None if count.value else "the NVIDIA driver finds no GPU"


def gpu_present() -> bool:
    """True if the driver is installed and sees a GPU."""
    return absent() is None


@lru_cache
def compute_capability() -> str | None:
    """Compute capability of the first GPU, such as "8.9"; None without a GPU."""
    library, device, numbers = driver(), ctypes.c_int(), [ctypes.c_int() for _ in _CAPABILITY]
    if library is None or not gpu_present() or library.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in zip(numbers, _CAPABILITY, strict=True):
        if library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"{numbers[0].value}.{numbers[1].value}"


@lru_cache
def cuda_version() -> str | None:
    """The newest CUDA that the driver supports, such as "12.8"; None without a driver."""
    library, version = driver(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
