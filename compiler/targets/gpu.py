"""Whether an NVIDIA GPU can be used, asked of the driver itself."""

from __future__ import annotations

import ctypes
from functools import lru_cache


@lru_cache
def gpu_present() -> bool:
    """True if the CUDA driver is installed and sees a device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
