"""The kernels of plugins: their tiles, each compiled once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trimtab.plugins import FOLDERS, OPS
from trimtab.plugins.dialect import Form, Op
from trimtab.plugins.driver import absent, compute_capability, cuda_version
from trimtab.plugins.gpu.ptx import SHARED_BUDGET, assemble

if TYPE_CHECKING:
    from trimtab.plugins.gpu import GpuKernel, Tile
    from trimtab.plugins.gpu.compile import Compiled

__all__ = ["compiled", "divider", "has_kernel", "kernel_of", "launches", "tactics", "this_gpu", "tile_of"]


@lru_cache
def has_kernel(op: Op) -> bool:
    """Whether the op's folder has kernels for GPUs."""
    return _module(op, "gpu") is not None


@lru_cache
def launches() -> dict[str, tuple[Op, str]]:
    """Name → op that is one launch on a GPU, and the module of its kernel: ops of the dialect, and parts of such."""
    kernels: dict[str, tuple[Op, str]] = {}
    for op in OPS.values():
        if (gpu := _module(op, "gpu")) is not None:
            divided = _module(op, "launches")
            parts = (op,) if divided is None else importlib.import_module(divided).LAUNCHES
            kernels |= {part.name: (part, gpu) for part in parts}
    return kernels


def divider(op: Op) -> Callable[..., list[tuple[Op, dict[str, Any], dict[str, Any]]]] | None:
    """The function that divides a node of `op` into launches (see `packed_attention/launches.py`); None for one."""
    divided = _module(op, "launches")
    return None if divided is None else importlib.import_module(divided).divide


def _module(op: Op, name: str) -> str | None:
    """The module of that name in the op's folder, if it has one."""
    path = f"trimtab.plugins.{FOLDERS.get(op.name)}.{name}"
    return path if op.name in FOLDERS and importlib.util.find_spec(path) else None


@lru_cache
def kernel_of(op: Op) -> GpuKernel:
    """The kernel of an op of one launch. Raises ModuleNotFoundError if the package `triton` is missing."""
    module = importlib.import_module(launches()[op.name][1])
    kernels = module.KERNELS if hasattr(module, "KERNELS") else (module.KERNEL,)
    kernel: GpuKernel = next(each for each in kernels if each.op is op)
    return kernel


def this_gpu() -> int:
    """Compute capability of this machine's GPU; 90 is 9.0.

    Raises:
        RuntimeError: there is none.
    """
    if (capability := compute_capability()) is None:
        raise RuntimeError(f"{absent()}; engines with plugins are built on the machine whose GPU they are for")
    return int(capability.replace(".", ""))


def tactics(kernel: GpuKernel, form: Form, shapes: Any, most_tokens: int, capability: int) -> list[int]:
    """Numbers of the tiles that are worth timing, from 1.

    Tiles of many tokens are none for one token, if there are others. Neither are those with more shared memory than a
    kernel gets unasked, since TensorRT is not known to ask; nor, as long as there are others, those whose registers
    spill.
    """
    every = dict(enumerate(kernel.tiles(form, shapes), 1))
    tiles = {n: t for n, t in every.items() if t.tokens == 1 or most_tokens > 1} or every
    variants = {number: compiled(kernel, form, shapes, tile, capability) for number, tile in tiles.items()}
    fit = [number for number, each in variants.items() if each.shared_bytes <= SHARED_BUDGET]
    return [number for number in fit if not _spilled_bytes(variants[number].ptx, capability)] or fit


@lru_cache
def _spilled_bytes(ptx: str, capability: int) -> int:
    return assemble(ptx, capability).spilled_bytes


def tile_of(kernel: GpuKernel, form: Form, shapes: Any, tactic: int) -> Tile:
    """The tile of a tactic; TensorRT's tactic 0 means any tile."""
    return kernel.tiles(form, shapes)[max(tactic, 1) - 1]


_compiled_kernels: dict[tuple[Any, ...], Compiled] = {}


def compiled(kernel: GpuKernel, form: Form, shapes: Any, tile: Tile, capability: int) -> Compiled:
    """The compiled kernel, shared by all layers of a model with the same form, sizes and tile."""
    from trimtab.plugins.gpu.compile import compile_kernel

    constants = kernel.constants(form, shapes, tile)
    types = tuple(sorted(form.given.items()))
    key = (kernel.op.name, types, form.unnamed, tuple(sorted(constants.items())), tile, capability)
    if key not in _compiled_kernels:
        _compiled_kernels[key] = compile_kernel(kernel, form, shapes, tile, capability, _ptx_version(capability))
    return _compiled_kernels[key]


def _ptx_version(capability: int) -> int | None:
    """PTX version of this machine's driver if it is older than the assembler's; else None."""
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

    newest = cuda_version()
    if newest is None:
        return None
    taken: int = ptx_get_version(newest)
    return taken if taken < ptx_get_version(get_ptxas(capability).version) else None
