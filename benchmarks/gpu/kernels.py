"""The GPU kernels of the dialect: each checked against float64, then timed against cuBLAS at the shapes of LLaMA-7B.

    python benchmarks/gpu/kernels.py [--json FILE] [--sweep]

Attention is timed against torch's at the shapes of MiniLM and BERT. Kernels are compiled to PTX and launched by the
driver, as TensorRT launches them. Layers of weights follow each other in one CUDA graph, more than the L2 cache holds.
Of the tiles that a builder would time, the fastest counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from attention import attention
from cases import (
    DOWN,
    HEAD,
    NEURONS,
    SELECT,
    UP,
    VOCABULARY,
    WIDTH,
    Case,
    chosen,
    compile_all,
    short,
    weights,
)  # fmt: skip
from checks import check
from graphs import copy_bandwidth, seconds

from trimtab.plugins.gpu.kernel import Tile
from trimtab.plugins.gpu.launch import prepared

LAYERS = 16  # of random weights: 4.3 GB in half precision
DENSITIES = (0.05, 0.10, 0.25, 0.50, 0.75, 1.0)
BATCHES = (1, 2, 4, 8, 16)


@dataclass
class Layers:
    """Weights of all layers in half precision, dense and as the kernels read them; int8 beside."""

    gate_up: list[torch.Tensor]  # gate and up under each other: one product of cuBLAS
    down: list[torch.Tensor]

    @classmethod
    def random(cls) -> Layers:
        made = [weights(2 * NEURONS, WIDTH, torch.float16) for _ in range(LAYERS)]
        return cls(made, [weights(NEURONS, WIDTH, torch.float16) for _ in range(LAYERS)])

    def dense(self, tokens: int) -> tuple[float, float]:
        """Seconds per layer of the dense FFN: cuBLAS's two products and one kernel between them; and without that."""
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.float16)
        h = torch.randn(tokens, NEURONS, device="cuda", dtype=torch.float16)
        both = torch.randn(tokens, 2 * NEURONS, device="cuda", dtype=torch.float16)
        whole: list[Callable[[], object]] = []
        products: list[Callable[[], object]] = []
        between = partial(silu_times[(tokens, triton.cdiv(NEURONS, 1024))], both, h, NEURONS, 1024)
        for up, down in zip(self.gate_up, self.turned(), strict=True):
            first, last = (partial(torch.nn.functional.linear, *pair) for pair in ((x, up), (h, down)))
            products += [first, last]
            whole += [first, between, last]
        return seconds(whole) / LAYERS, seconds(products) / LAYERS

    def turned(self) -> list[torch.Tensor]:
        """`down` as torch lays it out, [WIDTH, NEURONS] contiguous."""
        if not hasattr(self, "_turned"):
            self._turned = [w.t().contiguous() for w in self.down]
        return self._turned

    def sparse(self, tokens: int, k: int, own: bool, block: int = 1) -> tuple[Case, Case]:
        """SparseUp and SparseDown for k neurons, in random blocks."""
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.float16)
        h = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
        ups, downs = [], []
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            blocks = chosen(tokens if own else 1, NEURONS // block, k // block)
            ups.append({"x": x, "blocks": blocks, "up": gate_up[NEURONS:], "gate": gate_up[:NEURONS]})
            downs.append({"h": h, "blocks": blocks, "down": down})
        return Case(UP, ups, {"activation": "silu", "block": block}), Case(DOWN, downs, {"block": block})


@triton.jit
def silu_times(both, h, NEURONS: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) · up of one token, gate before up."""
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < NEURONS
    row = both + tl.program_id(0) * 2 * NEURONS
    g = tl.load(row + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(row + NEURONS + at, mask=there, other=0.0).to(tl.float32)
    tl.store(h + tl.program_id(0) * NEURONS + at, (g * tl.sigmoid(g) * u).to(tl.float16), mask=there)


def together(up: Case, down: Case, tiles: tuple[Tile, Tile], scores: int = 0) -> float:
    """Seconds per layer of both ops, one after the other, SelectBlocks before them where there are scores."""
    runs: list[Callable[[], object]] = []
    for first, second in zip(up.layers, down.layers, strict=True):
        if scores:
            choice = {"scores": torch.randn(1, scores, device="cuda").half()}
            run, (blocks,) = prepared(SELECT, choice, {"k": first["blocks"].shape[1]})
            runs.append(run)
            first, second = ({**inputs, "blocks": blocks} for inputs in (first, second))
        run, (h,) = prepared(UP, first, up.attributes, tiles[0])
        runs += [run, prepared(DOWN, {**second, "h": h}, down.attributes, tiles[1])[0]]
    return seconds(runs) / len(up.layers)


def ffn(layers: Layers, copy: float) -> list[dict[str, Any]]:
    """All densities and batches, a choice of neurons shared by the batch, or one for each of its tokens."""
    rows = []
    cases = [layers.sparse(tokens, 64, False) for tokens in (1, 2)]
    compile_all(job for pair in cases for case in pair for job in case.jobs())
    dense = {tokens: layers.dense(tokens) for tokens in BATCHES}
    for tokens, density, own in product(BATCHES, DENSITIES, (False, True)):
        if own and (tokens == 1 or density > 0.25):
            continue
        k = max(16, round(NEURONS * density / 16) * 16)
        up, down = layers.sparse(tokens, k, own)
        (up_s, up_tile), (down_s, down_tile) = up.best(), down.best()
        both = together(up, down, (up_tile, down_tile))
        whole, products = dense[tokens]
        size = 3 * k * WIDTH * 2 * (tokens if own else 1)
        row = {
            "tokens": tokens, "own": own, "density": density, "dense_us": whole * 1e6, "products_us": products * 1e6,
            "sparse_us": both * 1e6, "up_us": up_s * 1e6, "down_us": down_s * 1e6, "ratio": whole / both,
            "ratio_to_products": products / both, "gb_per_s": size / both / 1e9, "share_of_copy": size / both / copy,
            "up_tile": short(up_tile), "down_tile": short(down_tile),
        }  # fmt: skip
        if tokens == 1:
            row["with_select_us"] = 1e6 * with_select(layers, k)
        rows.append(row)
        print(
            f"{tokens:3d} {'own' if own else 'shared':6s} {density:5.0%} dense {row['dense_us']:7.1f} sparse "
            f"{row['sparse_us']:7.1f} us (up {row['up_us']:6.1f} down {row['down_us']:6.1f}) {row['ratio']:6.2f}x "
            f"{row['gb_per_s']:6.0f} GB/s {row['share_of_copy']:4.0%} of copy  {row['up_tile']} {row['down_tile']}"
            + (f" select {row['with_select_us']:.1f}" if tokens == 1 else ""),
            flush=True,
        )
    return rows


def with_select(layers: Layers, k: int, block: int = 32) -> float:
    """Seconds per layer of all three ops, the choice in blocks of 32 neurons."""
    up, down = layers.sparse(1, max(block, k // block * block), False, block)
    return together(up, down, (up.best()[1], down.best()[1]), NEURONS // block)


def others(copy: float) -> list[dict[str, Any]]:
    """SelectBlocks beside torch.topk; SparseHead beside cuBLAS."""
    rows = []
    for tokens, count, k in product((1, 16), (NEURONS, VOCABULARY, 344), (0.05, 0.5)):
        inputs = [{"scores": torch.randn(tokens, count, device="cuda").half()} for _ in range(8)]
        time_s, tile = Case(SELECT, inputs, {"k": round(count * k)}).best()
        peer = seconds([partial(torch.topk, one["scores"], round(count * k)) for one in inputs]) / len(inputs)
        rows.append({"op": "SelectBlocks", "tokens": tokens, "count": count, "k": round(count * k),
                     "us": time_s * 1e6, "torch_topk_us": peer * 1e6, "tile": short(tile)})  # fmt: skip
    heads = [weights(VOCABULARY, WIDTH, torch.float16) for _ in range(4)]
    for tokens, k in product((1, 16), (512, 3200)):
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.float16)
        inputs = [{"x": x, "blocks": chosen(1, VOCABULARY, k), "weight": w} for w in heads]
        time_s, tile = Case(HEAD, inputs, {}).best()
        peer = seconds([partial(torch.nn.functional.linear, x, w) for w in heads]) / len(heads)
        rows.append({"op": "SparseHead", "tokens": tokens, "k": k, "us": time_s * 1e6, "dense_us": peer * 1e6,
                     "ratio": peer / time_s, "share_of_copy": k * WIDTH * 2 / time_s / copy,
                     "tile": short(tile)})  # fmt: skip
    for row in rows:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def int8(copy: float) -> list[dict[str, Any]]:
    """SparseUp and SparseDown with int8 weights, one token."""
    rows = []
    x = torch.randn(1, WIDTH, device="cuda", dtype=torch.float16)
    made = [[weights(NEURONS, WIDTH, torch.int8) for _ in range(3)] for _ in range(LAYERS)]
    scale = torch.rand(NEURONS, device="cuda").half() / 1000
    for density in DENSITIES:
        k = max(16, round(NEURONS * density / 16) * 16)
        h = torch.randn(1, k, device="cuda", dtype=torch.float16)
        blocks = [chosen(1, NEURONS, k) for _ in made]
        ups = [{"x": x, "blocks": b, "up": w[0], "up_scale": scale, "gate": w[1], "gate_scale": scale}
               for b, w in zip(blocks, made, strict=True)]  # fmt: skip
        downs = [{"h": h, "blocks": b, "down": w[2], "down_scale": scale} for b, w in zip(blocks, made, strict=True)]
        up, down = Case(UP, ups, {"activation": "silu"}), Case(DOWN, downs, {})
        tiles = up.best()[1], down.best()[1]
        time_s = together(up, down, tiles)
        rows.append({"density": density, "sparse_us": time_s * 1e6, "share_of_copy": 3 * k * WIDTH / time_s / copy,
                     "tiles": [short(tile) for tile in tiles]})  # fmt: skip
        print("int8", {key: round(v, 2) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    return rows


def sweep(layers: Layers) -> None:
    """More tiles than a builder would time, to choose those that it does."""

    def tiles(tokens: int, *choices: tuple[int, ...]) -> list[Tile]:
        made = [Tile(tokens, *chosen) for chosen in product(*choices)]
        return [t for t in made if tokens > 1 or 16 <= t.rows * t.columns // (32 * t.warps) <= 64]

    one_up = tiles(1, (1, 2), (1024, 2048, 4096), (2, 4, 8), (1,))
    one_down = [*tiles(1, (256, 512, 1024), (16, 32, 64), (4, 8, 16), (1,)), Tile(1, 256, 32, 8, 3)]
    many_up = tiles(16, (8, 16, 32), (64, 128, 256), (2, 4), (2, 4))
    many_down = tiles(16, (64, 128, 256), (16, 32, 64), (4, 8), (1, 3))
    cases = [layers.sparse(tokens, k, False) for tokens, k in ((1, 544), (1, 5504), (16, 544), (16, 5504))]
    jobs = []
    lists = [(one_up, one_down), (one_up, one_down), (many_up, many_down), (many_up, many_down)]
    for pair, tiles in zip(cases[::2], lists[::2], strict=True):
        for case, some in zip(pair, tiles, strict=True):
            jobs += case.jobs(some)
    compile_all(jobs)
    for pair, tiles in zip(cases, lists, strict=True):
        for case, some in zip(pair, tiles, strict=True):
            timed = sorted((case.time(tile), repr(tile), tile) for tile in case.fitting(some))
            shape = case.layers[0]["x" if "x" in case.layers[0] else "h"].shape[0], case.layers[0]["blocks"].shape[1]
            print(
                case.kernel.op.name, shape, [(round(t * 1e6, 2), short(tile)) for t, _, tile in timed[:6]], flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--sweep", action="store_true", help="time many tiles, and stop")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("not measured: this machine has no NVIDIA GPU")
    device = torch.cuda.get_device_properties(0)
    started = time.monotonic()
    checked = check()
    wrong = [row for row in checked if not row["right"]]
    print(f"{len(checked)} checks against float64, {len(wrong)} wrong, {time.monotonic() - started:.0f} s")
    for row in wrong:
        print("WRONG", row)
    copy = copy_bandwidth()
    print(f"{device.name}: a copy moves {copy / 1e9:.0f} GB/s", flush=True)
    layers = Layers.random()
    floor = together(*layers.sparse(1, 16, False), (Tile(1, 1, 4096, 4), Tile(1, 16, 64, 4)))
    print(f"both ops with next to no work: {floor * 1e6:.2f} us", flush=True)
    if options.sweep:
        sweep(layers)
        return
    found = {
        "device": device.name, "compute_capability": f"{device.major}.{device.minor}",
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
        "command": "python benchmarks/gpu/kernels.py --json FILE", "copy_gb_per_s": copy / 1e9, "floor_us": floor * 1e6,
        "checks": {"done": len(checked), "wrong": wrong}, "ffn": ffn(layers, copy), "others": others(copy),
        "int8": int8(copy), "attention": attention(copy), "seconds": 0.0,
    }  # fmt: skip
    found["seconds"] = time.monotonic() - started
    print(f"{found['seconds']:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
