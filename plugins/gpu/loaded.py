"""Launches compiled PTX like TensorRT: by CUDA's driver, with only pointers and 32-bit sizes as arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from trimtab.plugins.driver import absent, driver
from trimtab.plugins.gpu.compile import Compiled
from trimtab.plugins.gpu.ptx import SHARED_BUDGET

__all__ = ["Loaded"]


class Loaded:
    """A kernel on the GPU that is current in this process.

    Raises:
        RuntimeError: the driver refuses the code; has its log.
    """

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        log = ctypes.create_string_buffer(4096)
        options = (ctypes.c_int * 2)(5, 6)  # CU_JIT_ERROR_LOG_BUFFER and its size
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        code = _driver().cuModuleLoadDataEx(ctypes.byref(module), compiled.ptx.encode(), 2, options, values)
        _check(code, log.value.decode(errors="replace"))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, compiled.name.encode()))
        if compiled.shared_bytes > SHARED_BUDGET:
            raise RuntimeError(f"{compiled.name} wants {compiled.shared_bytes} bytes of shared memory")

    def launch(
        self, grid: Sequence[int], pointers: Sequence[int], sizes: Sequence[int], outputs: Sequence[int], stream: int
    ) -> None:
        """Launch once on `stream`. Pointers to inputs in the order of the parameters, sizes, pointers to outputs."""
        values: list[Any] = [*map(ctypes.c_uint64, pointers), *map(ctypes.c_int32, sizes)]
        values += map(ctypes.c_uint64, outputs)
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        block = (self.compiled.threads, 1, 1)
        code = _driver().cuLaunchKernel(
            self._function, *grid, *block, self.compiled.shared_bytes, ctypes.c_void_p(stream), addresses, None
        )
        _check(code)


def _driver() -> ctypes.CDLL:
    if (library := driver()) is None:
        raise RuntimeError(absent())
    return library


def _check(code: int, log: str = "") -> None:
    if code:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(said))
        raise RuntimeError(f"CUDA driver: {(said.value or b'?').decode()} ({code}) {log}".strip())
