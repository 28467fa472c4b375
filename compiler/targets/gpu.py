"""What NVIDIA GPU can be used, asked of the driver itself."""

from __future__ import annotations

import ctypes
from functools import lru_cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@lru_cache
def gpu_present() -> bool:
    """True if the CUDA driver is installed and sees a device."""
    driver = _driver()
    count = ctypes.c_int()
    return driver is not None and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


@lru_cache
def compute_capability() -> str | None:
    """Of the first GPU, such as "8.9"; None without one."""
    driver = _driver()
    if driver is None or not gpu_present():
        return None
    device, found = ctypes.c_int(), []
    if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        found.append(value.value)
    return f"{found[0]}.{found[1]}"


def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None
