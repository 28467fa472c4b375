"""The sparse kernels against ONNX Runtime's dense products: python benchmarks/sparse_ffn.py --json

SwiGLU FFNs of 2048 → 8192, four layers of different weights, one token, two threads; blocks are chosen at random,
others in every run, so that no cache holds them. Peers in the same run: MatMul in fp32, MatMulInteger as ONNX
Runtime's dynamic quantization makes it, and MatMulNBits in blocks of 32. At best a layer takes `density` of the time
that memory needs for its weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import onnxruntime as ort
import typer

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.targets.sessions import session_options
from trimtab.compiler.targets.sparse_trials import dense_model, random_blocks, random_layers, sparse_model
from trimtab.passes.sparse_ffn.rows import RowForm, row_bytes
from trimtab.plugins.library import instruction_set, register

SELECTIONS = 16


def runner(path: Path, threads: int, feeds: list[dict[str, np.ndarray]]) -> Callable[[], object]:
    """A call that runs the model on one of `feeds` after the other."""
    options = session_options(threads)
    if not register(options):
        sys.exit("the native kernels are missing")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    turn = count()
    return lambda: session.run(None, feeds[next(turn) % len(feeds)])


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
    precision: Annotated[str, typer.Option(help="Some of fp32,int8,int4.")] = "fp32,int8,int4",
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
    made = random_layers(neurons, width, 3, layers)
    rng = np.random.default_rng()
    x = rng.standard_normal((1, 1, width), np.float32)
    with tempfile.TemporaryDirectory(prefix="trimtab-sparse-") as folder:
        kinds = cast("list[RowForm]", precision.split(","))
        for kind in kinds:
            path = dense_model(made, Path(folder) / "dense.onnx", kind)
            peer = runner(path, threads, [{"x": x}])
            model = sparse_model(made, Path(folder) / f"sparse-{kind}.onnx", block, kind)
            for density in map(float, densities.split(",")):
                k = max(1, round(density * neurons / block))
                feeds = [
                    {"x": x} | {f"blocks{i}": random_blocks(rng, 1, neurons // block, k) for i in range(layers)}
                    for _ in range(SELECTIONS)
                ]
                taken = interleave({"dense": peer, "sparse": runner(model, threads, feeds)}, seconds=seconds)
                read = 3 * layers * k * block * row_bytes(kind, width)
                ratio = taken["dense"].median_ms / taken["sparse"].median_ms
                pace = read / taken["sparse"].median_ms / 1e6
                rows.append({
                    "precision": kind, "density": k * block / neurons, "dense_ms": taken["dense"].median_ms,
                    "sparse_ms": taken["sparse"].median_ms, "ratio": ratio, "of_ideal": ratio * k * block / neurons,
                    "gb_s": pace, "of_memory": pace / bound,
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
        "{precision} at {density:.3f}: {dense_ms:.2f} ms dense, {sparse_ms:.3f} ms sparse: {ratio:.2f}x, "
        "{of_ideal:.2f} of ideal; {gb_s:.1f} GB/s".format(**row)
    )


if __name__ == "__main__":
    typer.run(main)
