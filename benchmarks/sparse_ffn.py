"""The sparse kernels against ONNX Runtime's dense products: python benchmarks/sparse_ffn.py --json

SwiGLU FFNs of 2048 → 8192, four layers of different weights, one token, two threads; blocks are chosen at random,
others in every run, so that no cache holds them. Peers in the same run: MatMul in fp32, which bf16 and fp16 have too,
MatMulInteger as ONNX Runtime's dynamic quantization makes it, and MatMulNBits in blocks of 32. At best a layer of one
token takes `density` of the time that memory needs for its weights; of T tokens that choose on their own, the share
`union` = 1 - (1 - density)^T of them is read, and `density` of the products is left.

Encoder: --width 384 --neurons 1536 --layers 6 --block 32 --plain --tokens 8,16,48 --densities 0.2
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from itertools import count as counter
from itertools import product
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import onnxruntime as ort
import typer

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.targets.sessions import session_options
from trimtab.compiler.targets.sparse_trials import dense_model, random_blocks, random_layers, sparse_model
from trimtab.passes.crossover import DenseForm
from trimtab.passes.sparse_ffn.rows import RowForm, row_bytes
from trimtab.plugins.library import instruction_set, register

SELECTIONS = 16
DENSE: dict[RowForm, DenseForm] = {"int8": "int8", "int4": "int4-blocks"}


def runner(path: Path, threads: int, feeds: list[dict[str, np.ndarray]]) -> Callable[[], object]:
    """A call that runs the model on one of `feeds` after the other."""
    options = session_options(threads)
    if not register(options):
        sys.exit("the native kernels are missing")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    turn = counter()
    return lambda: session.run(None, feeds[next(turn) % len(feeds)])


def chosen(rng: np.random.Generator, tokens: int, count: int, k: int, varying: bool) -> np.ndarray:
    """Blocks of each token, [tokens, k]; `varying`: as many as k on average, -1 behind them."""
    if not varying:
        return random_blocks(rng, tokens, count, k)
    most = min(count, k + k // 2)
    blocks = random_blocks(rng, tokens, count, most)
    blocks[np.arange(most) >= rng.integers(2 * k - most, most + 1, tokens)[:, None]] = -1
    return blocks


def copy_bound(threads: int) -> float:
    """GB/s of reading memory: the sum of an array far larger than the caches, as STREAM's kernels without a store."""
    import torch

    torch.set_num_threads(threads)
    array = torch.ones(1 << 28)
    taken = interleave({"sum": lambda: array.sum()}, seconds=3)["sum"].median_ms
    return array.nbytes / taken / 1e6


def main(
    width: int = 2048,
    neurons: int = 8192,
    layers: int = 4,
    block: Annotated[int, typer.Option(help="Neurons in a block.")] = 8,
    threads: int = 2,
    densities: Annotated[str, typer.Option(help="Shares of the neurons.")] = "0.05,0.1,0.25,0.5,1",
    precision: Annotated[str, typer.Option(help="Some of fp32,bf16,fp16,int8,int4.")] = "fp32,int8,int4",
    tokens: Annotated[str, typer.Option(help="In a call, each with its own choice.")] = "1",
    varying: Annotated[bool, typer.Option(help="Tokens take from half to one and a half times as many.")] = False,
    plain: Annotated[bool, typer.Option(help="FFNs without a gate.")] = False,
    seconds: Annotated[float, typer.Option(help="Of timing per density and precision.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    bound = copy_bound(threads)
    results: dict[str, object] = {
        "versions": package_versions(), "command": " ".join(sys.argv), "instructions": instruction_set(),
        "memory_gb_s": bound, "width": width, "neurons": neurons, "layers": layers, "block": block,
    }  # fmt: skip
    rows: list[dict[str, object]] = []
    made = random_layers(neurons, width, 2 if plain else 3, layers)
    rng = np.random.default_rng()
    count = neurons // block
    with tempfile.TemporaryDirectory(prefix="trimtab-sparse-") as folder:
        for kind in cast("list[RowForm]", precision.split(",")):
            path = dense_model(made, Path(folder) / "dense.onnx", DENSE.get(kind, "fp32"))
            model = sparse_model(made, Path(folder) / f"sparse-{kind}.onnx", block, kind, at_most=varying)
            for call, density in product(map(int, tokens.split(",")), map(float, densities.split(","))):
                x = rng.standard_normal((1, call, width), np.float32)
                k = max(1, round(density * count))
                choices = [[chosen(rng, call, count, k, varying) for _ in range(layers)] for _ in range(SELECTIONS)]
                feeds = [{"x": x} | {f"blocks{i}": one for i, one in enumerate(each)} for each in choices]
                runs = {"dense": runner(path, threads, [{"x": x}]), "sparse": runner(model, threads, feeds)}
                taken = {name: timing.median_ms for name, timing in interleave(runs, seconds=seconds).items()}
                ratio = taken["dense"] / taken["sparse"]
                union = float(np.mean([len(np.unique(one[one >= 0])) for each in choices for one in each])) / count
                read = (2 if plain else 3) * layers * union * neurons * row_bytes(kind, width)
                pace = read / taken["sparse"] / 1e6
                products = 2 * (2 if plain else 3) * layers * call * width * neurons
                rows.append({
                    "precision": kind, "tokens": call, "density": k / count, "union": union,
                    "dense_ms": taken["dense"], "sparse_ms": taken["sparse"], "ratio": ratio,
                    "of_ideal": ratio * k / count, "gb_s": pace, "of_memory": pace / bound,
                    "gflops": products * k / count / taken["sparse"] / 1e6,
                    "dense_gflops": products / taken["dense"] / 1e6,
                })  # fmt: skip
                if not as_json:
                    show(rows[-1])
    text = json.dumps(results | {"rows": rows}, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        print(f"memory: {bound:.1f} GB/s")


def show(row: dict[str, object]) -> None:
    print(
        "{precision} at {density:.3f}, {tokens} tokens: {dense_ms:.2f} ms dense, {sparse_ms:.3f} ms sparse: "
        "{ratio:.2f}x, {of_ideal:.2f} of ideal; union {union:.2f}, {gb_s:.1f} GB/s, {gflops:.0f} GFLOP/s beside "
        "{dense_gflops:.0f}".format(**row)
    )


if __name__ == "__main__":
    typer.run(main)
