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
import onnx_graphsurgeon as gs
import onnxruntime as ort
import typer

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.targets.onnxruntime import session_options
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.ffn_topk.rows import RowForm, row_bytes, row_constants
from trimtab.passes.graph import insert, save_graph
from trimtab.passes.matrices.forms import Dense
from trimtab.passes.matrices.quantize import round_to_nearest
from trimtab.plugins import SPARSE_DOWN, SPARSE_UP, add_node
from trimtab.plugins.library import instruction_set, register

SELECTIONS = 16


def weights(width: int, neurons: int, layers: int) -> list[list[np.ndarray]]:
    """(gate, up, down) of each layer, row-major by neuron: [neurons, width]."""
    rng = np.random.default_rng(0)
    scale = np.float32(width**-0.5)
    return [[rng.standard_normal((neurons, width), np.float32) * scale for _ in range(3)] for _ in range(layers)]


def new_graph(width: int) -> gs.Graph:
    # With a batch, as models have it: without, a product and the residual behind it would become one Gemm.
    x = gs.Variable("x", np.float32, ["batch", "tokens", width])
    return gs.Graph(inputs=[x], opset=21, ir_version=10, name="ffn")


def residual(graph: gs.Graph, x: gs.Tensor, y: gs.Tensor, name: str) -> gs.Variable:
    return insert(graph, "Add", [x, y], f"{name}/residual", dtype=np.float32)


def finish(graph: gs.Graph, x: gs.Variable, width: int, path: Path) -> Path:
    x.name, x.shape = "y", ["batch", "tokens", width]
    graph.outputs = [x]
    save_graph(graph, path)
    return path


def dense(layers: list[list[np.ndarray]], path: Path, precision: str) -> Path:
    """The FFNs as MatMuls."""
    width = layers[0][0].shape[1]
    graph = new_graph(width)
    x = graph.inputs[0]

    def product(x: gs.Tensor, w: np.ndarray, name: str) -> gs.Variable:
        form = round_to_nearest(w, 4, 32, search=False) if precision == "int4" else Dense(w)
        return form.emit(graph, x, name, np.dtype(np.float32))

    for i, (gate, up, down) in enumerate(layers):
        g = product(x, gate.T, f"{i}/gate")
        u = product(x, up.T, f"{i}/up")
        s = insert(graph, "Sigmoid", [g], f"{i}/sigmoid", dtype=np.float32)
        a = insert(graph, "Mul", [g, s], f"{i}/silu", dtype=np.float32)
        h = insert(graph, "Mul", [a, u], f"{i}/h", dtype=np.float32)
        x = residual(graph, x, product(h, down, f"{i}/down"), str(i))
    path = finish(graph, x, width, path)
    if precision == "int8":
        quantize_file(path, path.with_name("int8.onnx"), reduce_range=False)
        return path.with_name("int8.onnx")
    return path


def sparse(layers: list[list[np.ndarray]], path: Path, block: int, precision: RowForm) -> Path:
    """The FFNs as SparseUp and SparseDown, with the blocks of each layer as an input."""
    width = layers[0][0].shape[1]
    graph = new_graph(width)
    x = graph.inputs[0]
    for i, layer in enumerate(layers):
        blocks = gs.Variable(f"blocks{i}", np.int32, [1, "k"])
        graph.inputs.append(blocks)
        parts: dict[str, gs.Tensor] = {}
        for label, w in zip(("gate", "up", "down"), layer, strict=True):
            parts |= row_constants(w, precision, label, f"{i}")
        ups = {key: value for key, value in parts.items() if not key.startswith("down")}
        downs = {key: value for key, value in parts.items() if key.startswith("down")}
        h = add_node(graph, SPARSE_UP, {"x": x, "blocks": blocks} | ups, f"{i}/h", activation="silu", block=block)
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, f"{i}/y", block=block)
        x = residual(graph, x, y, str(i))
    return finish(graph, x, width, path)


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
    made = weights(width, neurons, layers)
    rng = np.random.default_rng()
    x = rng.standard_normal((1, 1, width), np.float32)
    with tempfile.TemporaryDirectory(prefix="trimtab-sparse-") as folder:
        kinds = cast("list[RowForm]", precision.split(","))
        for kind in kinds:
            path = dense(made, Path(folder) / "dense.onnx", kind)
            peer = runner(path, threads, [{"x": x}])
            model = sparse(made, Path(folder) / f"sparse-{kind}.onnx", block, kind)
            for density in map(float, densities.split(",")):
                k = max(1, round(density * neurons / block))
                feeds = [
                    {"x": x} | {f"blocks{i}": choose(rng, neurons // block, k) for i in range(layers)}
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


def choose(rng: np.random.Generator, blocks: int, k: int) -> np.ndarray:
    return np.sort(rng.choice(blocks, k, replace=False)).astype(np.int32)[None]


def show(row: dict[str, object]) -> None:
    print(
        "{precision} at {density:.3f}: {dense_ms:.2f} ms dense, {sparse_ms:.3f} ms sparse: {ratio:.2f}x, "
        "{of_ideal:.2f} of ideal; {gb_s:.1f} GB/s".format(**row)
    )


if __name__ == "__main__":
    typer.run(main)
