"""The GPU of this machine, asked of its driver."""

from __future__ import annotations

import ctypes
import ctypes.util
from functools import lru_cache

__all__ = ["capability"]

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@lru_cache
def capability(device: int = 0) -> int:
    """Compute capability, major and minor: 90 is 9.0.

    Raises:
        RuntimeError: there is no driver or no such GPU.
    """
    try:
        driver = ctypes.CDLL(ctypes.util.find_library("cuda") or "libcuda.so.1")
    except OSError as error:
        raise RuntimeError(
            f"the NVIDIA driver's library is missing ({error}); plugins are built on the GPU's machine"
        ) from error
    if code := driver.cuInit(0):
        raise RuntimeError(
            f"the NVIDIA driver finds no GPU (cuInit: error {code}); plugins are built on the GPU's machine"
        )
    found = [ctypes.c_int() for _ in (_MAJOR, _MINOR)]
    for value, attribute in zip(found, (_MAJOR, _MINOR), strict=True):
        if code := driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            raise RuntimeError(f"the NVIDIA driver does not know GPU {device} (error {code})")
    return found[0].value * 10 + found[1].value
