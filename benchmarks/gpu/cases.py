"""One kernel on some inputs: its tiles, the time of each, and all of them compiled at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from graphs import seconds

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.compile import compile_kernel
from trimtab.plugins.gpu.kernel import GpuKernel, Tile
from trimtab.plugins.gpu.launch import form_of, prepared
from trimtab.plugins.gpu.ptx import SHARED_BUDGET
from trimtab.plugins.packed_attention.gpu import KERNELS as ATTENTION_KERNELS
from trimtab.plugins.select_blocks.gpu import KERNEL as SELECT
from trimtab.plugins.sparse_down.gpu import KERNEL as DOWN
from trimtab.plugins.sparse_head.gpu import KERNEL as HEAD
from trimtab.plugins.sparse_up.gpu import KERNEL as UP

WIDTH, NEURONS, VOCABULARY = 4096, 11008, 32000  # LLaMA-7B
ATTENTION, RECEIVED = ATTENTION_KERNELS

Job = tuple[str, Form, Mapping[str, tuple[int, ...]], Tile]


@dataclass(frozen=True)
class Case:
    """One kernel on some layers of inputs, without the optional outputs `unnamed`."""

    kernel: GpuKernel
    layers: list[dict[str, torch.Tensor]]
    attributes: dict[str, int | str]
    unnamed: tuple[str, ...] = ()

    def all_tiles(self) -> tuple[Tile, ...]:
        return self.kernel.tiles(*self._shape())

    def tiles(self) -> tuple[Tile, ...]:
        """Those that a plugin offers: of as much shared memory as needs no permission."""
        return self.fitting(self.all_tiles())

    def fitting(self, tiles: Iterable[Tile]) -> tuple[Tile, ...]:
        form, shapes = self._shape()
        made = ((tile, compile_kernel(self.kernel, form, shapes, tile, capability())) for tile in tiles)
        return tuple(tile for tile, compiled in made if compiled.shared_bytes <= SHARED_BUDGET)

    def _shape(self) -> tuple[Form, dict[str, tuple[int, ...]]]:
        form = replace(form_of(self.kernel, self.layers[0], self.attributes), unnamed=frozenset(self.unnamed))
        return form, {name: tuple(tensor.shape) for name, tensor in self.layers[0].items()}

    def time(self, tile: Tile) -> float:
        """Seconds per layer."""
        runs = [prepared(self.kernel, inputs, self.attributes, tile, self.unnamed)[0] for inputs in self.layers]
        return seconds(runs) / len(runs)

    def best(self, tiles: Iterable[Tile] | None = None) -> tuple[float, Tile]:
        return min(((self.time(tile), tile) for tile in tiles or self.tiles()), key=lambda found: found[0])

    def jobs(self, tiles: Iterable[Tile] | None = None) -> list[Job]:
        """What there is to compile."""
        form, shapes = self._shape()
        return [(self.kernel.op.name, form, shapes, tile) for tile in tiles or self.all_tiles()]


def capability() -> int:
    """Of the GPU: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def chosen(tokens: int, blocks: int, k: int) -> torch.Tensor:
    """Random blocks in ascending order, [tokens, k]."""
    scores = torch.rand(tokens, blocks, device="cuda")
    return scores.topk(k).indices.sort(-1).values.int()


def weights(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (rows, width), dtype=dtype, device="cuda")
    return (torch.randn(rows, width, device="cuda") / width**0.5).to(dtype)


def short(tile: Tile) -> str:
    return f"{tile.tokens}/{tile.rows}x{tile.columns}/w{tile.warps}s{tile.stages}"


def compile_all(jobs: Iterable[Job]) -> None:
    """Fill the Triton language's cache, on all cores."""
    unique = {repr(job): job for job in jobs}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(_compile, capability()), unique.values(), chunksize=2))


def _compile(sm: int, job: Job) -> None:
    name, form, shapes, tile = job
    kernel = {k.op.name: k for k in (UP, DOWN, HEAD, SELECT, *ATTENTION_KERNELS)}[name]
    try:
        compile_kernel(kernel, form, shapes, tile, sm)
    except Exception as error:  # of one tile: whoever launches it meets the error again
        print("not compiled", name, tile, str(error)[:100])
