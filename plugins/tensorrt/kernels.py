"""The kernel of a plugin: which tiles there are, and each compiled once."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trimtab.plugins.dialect import Form, Op

if TYPE_CHECKING:
    from trimtab.plugins.gpu import GpuKernel, Tile
    from trimtab.plugins.gpu.compile import Compiled

__all__ = ["compiled", "kernel_of", "tactics", "tile_of"]

_FOLDERS = {
    "SelectBlocks": "select_blocks",
    "SparseUp": "sparse_up",
    "SparseDown": "sparse_down",
    "SparseHead": "sparse_head",
}


@lru_cache
def kernel_of(op: Op) -> GpuKernel:
    """Raises ModuleNotFoundError where the package `triton` is missing."""
    kernel: GpuKernel = importlib.import_module(f"trimtab.plugins.{_FOLDERS[op.name]}.gpu").KERNEL
    return kernel


def tactics(kernel: GpuKernel, form: Form, shapes: Any, most_tokens: int | None) -> list[int]:
    """Numbers of the tiles that are worth timing, from 1: those of many tokens are none for one token."""
    tiles = kernel.tiles(form, shapes)
    return [n for n, tile in enumerate(tiles, 1) if tile.tokens == 1 or most_tokens is None or most_tokens > 1]


def tile_of(kernel: GpuKernel, form: Form, shapes: Any, tactic: int) -> Tile:
    """The tile that a tactic stands for; 0 is TensorRT's word for none in particular."""
    return kernel.tiles(form, shapes)[max(tactic, 1) - 1]


_made: dict[tuple[Any, ...], Compiled] = {}


def compiled(kernel: GpuKernel, form: Form, shapes: Any, tile: Tile, capability: int) -> Compiled:
    """Compiled once for all layers of a model that differ in nothing that the kernel has in it."""
    from trimtab.plugins.gpu.compile import compile_kernel

    constants = kernel.constants(form, shapes, tile)
    key = (kernel.op.name, tuple(sorted(form.given.items())), tuple(sorted(constants.items())), tile, capability)
    if key not in _made:
        _made[key] = compile_kernel(kernel, form, shapes, tile, capability)
    return _made[key]
