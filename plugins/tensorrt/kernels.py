"""The kernel of a plugin: which tiles there are, and each compiled once."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trimtab.plugins import FOLDERS
from trimtab.plugins.dialect import Form, Op
from trimtab.plugins.driver import absent, compute_capability, cuda_version
from trimtab.plugins.gpu.ptx import SHARED_BUDGET, assemble

if TYPE_CHECKING:
    from trimtab.plugins.gpu import GpuKernel, Tile
    from trimtab.plugins.gpu.compile import Compiled

__all__ = ["compiled", "has_kernel", "kernel_of", "tactics", "this_gpu", "tile_of"]


@lru_cache
def has_kernel(op: Op) -> bool:
    """Whether the op's folder has a kernel for GPUs."""
    return importlib.util.find_spec(f"trimtab.plugins.{FOLDERS[op.name]}.gpu") is not None


@lru_cache
def kernel_of(op: Op) -> GpuKernel:
    """Raises ModuleNotFoundError where the package `triton` is missing."""
    kernel: GpuKernel = importlib.import_module(f"trimtab.plugins.{FOLDERS[op.name]}.gpu").KERNEL
    return kernel


def this_gpu() -> int:
    """Compute capability of this machine's GPU; 90 is 9.0.

    Raises:
        RuntimeError: there is none.
    """
    if (found := compute_capability()) is None:
        raise RuntimeError(f"{absent()}; engines with plugins are built on the machine whose GPU they are for")
    return int(found.replace(".", ""))


def tactics(kernel: GpuKernel, form: Form, shapes: Any, most_tokens: int, capability: int) -> list[int]:
    """Numbers of the tiles that are worth timing, from 1.

    Tiles of many tokens are none for one token. Neither are those with more shared memory than a kernel gets unasked,
    since TensorRT is not known to ask; nor, as long as there are others, those whose registers spill.
    """
    tiles = {n: t for n, t in enumerate(kernel.tiles(form, shapes), 1) if t.tokens == 1 or most_tokens > 1}
    made = {number: compiled(kernel, form, shapes, tile, capability) for number, tile in tiles.items()}
    fit = [number for number, each in made.items() if each.shared_bytes <= SHARED_BUDGET]
    return [number for number in fit if not _spilled_bytes(made[number].ptx, capability)] or fit


@lru_cache
def _spilled_bytes(ptx: str, capability: int) -> int:
    return assemble(ptx, capability).spilled_bytes


def tile_of(kernel: GpuKernel, form: Form, shapes: Any, tactic: int) -> Tile:
    """The tile that a tactic stands for; 0 is TensorRT's word for none in particular."""
    return kernel.tiles(form, shapes)[max(tactic, 1) - 1]


_made: dict[tuple[Any, ...], Compiled] = {}


def compiled(kernel: GpuKernel, form: Form, shapes: Any, tile: Tile, capability: int) -> Compiled:
    """Compiled once for all layers of a model that differ in nothing that the kernel has in it."""
    from trimtab.plugins.gpu.compile import compile_kernel

    constants = kernel.constants(form, shapes, tile)
    types = tuple(sorted(form.given.items()))
    key = (kernel.op.name, types, form.unnamed, tuple(sorted(constants.items())), tile, capability)
    if key not in _made:
        _made[key] = compile_kernel(kernel, form, shapes, tile, capability, _ptx_version(capability))
    return _made[key]


def _ptx_version(capability: int) -> int | None:
    """The newest that this machine's driver takes, where it is older than the assembler; None for the assembler's."""
    from triton.backends.nvidia.compiler import get_ptxas, ptx_get_version

    newest = cuda_version()
    if newest is None:
        return None
    taken: int = ptx_get_version(newest)
    return taken if taken < ptx_get_version(get_ptxas(capability).version) else None
