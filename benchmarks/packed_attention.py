"""PackedAttention against ONNX Runtime's own attention: python benchmarks/packed_attention.py --json

Float32, two threads, no padding (where packing wins by itself), the three in turns in one run: q, k and v → context, as
an exporter writes it (reshapes, transposes, two products, softmax; optimised by ONNX Runtime), as com.microsoft
MultiHeadAttention, and as PackedAttention. A chain of several attentions is timed, which share the cost of a call.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import typer

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.targets.sessions import session_options
from trimtab.plugins import PACKED_ATTENTION, add_node
from trimtab.plugins.library import instruction_set, register

CHAIN = 6
SHAPES = "1x8,1x16,1x48,1x128,1x512,8x16,8x48,8x128,32x48,32x128"


def insert(graph: gs.Graph, op: str, inputs: list[gs.Tensor], domain: str = "", **attrs: object) -> gs.Variable:
    out = gs.Variable(f"t{len(graph.nodes)}", np.float32)
    graph.nodes.append(gs.Node(op, out.name, attrs, inputs, [out], domain=domain))
    return out


def decomposed(graph: gs.Graph, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, heads: int, width: int) -> gs.Variable:
    split = gs.Constant(f"split{len(graph.nodes)}", np.array([0, 0, heads, width // heads]))
    join = gs.Constant(f"join{len(graph.nodes)}", np.array([0, 0, width]))
    scale = gs.Constant(f"scale{len(graph.nodes)}", np.array((width // heads) ** -0.5, np.float32))
    parts = [insert(graph, "Reshape", [x, split]) for x in (q, k, v)]
    perms = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    a, b, c = (insert(graph, "Transpose", [x], perm=perm) for x, perm in zip(parts, perms, strict=True))
    scores = insert(graph, "Mul", [insert(graph, "MatMul", [a, b]), scale])
    mixed = insert(graph, "MatMul", [insert(graph, "Softmax", [scores], axis=-1), c])
    return insert(graph, "Reshape", [insert(graph, "Transpose", [mixed], perm=[0, 2, 1, 3]), join])


def multi_head(graph: gs.Graph, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, heads: int, width: int) -> gs.Variable:
    return insert(graph, "MultiHeadAttention", [q, k, v], "com.microsoft", num_heads=heads)


def packed(graph: gs.Graph, q: gs.Tensor, k: gs.Tensor, v: gs.Tensor, heads: int, width: int) -> gs.Variable:
    inputs = {"q": q, "k": k, "v": v, "offsets": graph.inputs[3]}
    return add_node(graph, PACKED_ATTENTION, inputs, f"t{len(graph.nodes)}", heads=heads)


FORMS = {"decomposed": decomposed, "MultiHeadAttention": multi_head, "PackedAttention": packed}


def session(form: str, heads: int, width: int, folder: Path, threads: int) -> ort.InferenceSession:
    """A chain: the context of each attention is the next one's q."""
    lead = ["rows"] if form == "PackedAttention" else ["batch", "tokens"]
    inputs = [gs.Variable(name, np.float32, [*lead, width]) for name in "qkv"]
    if form == "PackedAttention":
        inputs.append(gs.Variable("offsets", np.int32, ["ends"]))
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = gs.Graph(inputs=inputs, opset=21, ir_version=10, import_domains=domains)
    x, k, v = inputs[:3]
    for _ in range(CHAIN):
        x = FORMS[form](graph, x, k, v, heads, width)
    graph.outputs = [x]
    x.dtype = np.float32
    onnx.save(gs.export_onnx(graph), folder / f"{form}.onnx")
    options = session_options(threads)
    if not register(options):
        sys.exit("the native kernels are missing")
    return ort.InferenceSession(str(folder / f"{form}.onnx"), options, providers=["CPUExecutionProvider"])


def main(
    heads: int = 12,
    dim: Annotated[int, typer.Option(help="Of a head.")] = 32,
    shapes: Annotated[
        str, typer.Option(help="batch x tokens.")
    ] = "1x8,1x16,1x48,1x128,1x512,8x16,8x48,8x128,32x48,32x128",
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="Of timing per shape.")] = 6.0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    width, rows = heads * dim, []
    rng = np.random.default_rng()
    with tempfile.TemporaryDirectory(prefix="trimtab-attention-") as folder:
        sessions = {form: session(form, heads, width, Path(folder), threads) for form in FORMS}
        for shape in shapes.split(","):
            batch, tokens = map(int, shape.split("x"))
            q, k, v = (rng.standard_normal((batch, tokens, width), np.float32) for _ in range(3))
            padded = {"q": q, "k": k, "v": v}
            flat: dict[str, np.ndarray] = {name: x.reshape(-1, width) for name, x in padded.items()}
            flat["offsets"] = np.arange(batch + 1, dtype=np.int32) * tokens
            feeds = {form: flat if form == "PackedAttention" else padded for form in FORMS}
            runs = {form: partial(sessions[form].run, None, feeds[form]) for form in FORMS}
            results = [run()[0].reshape(-1, width) for run in runs.values()]
            assert all(np.allclose(results[0], other, atol=1e-4) for other in results[1:])
            taken = interleave(runs, seconds=seconds)
            us = {form: taken[form].median_ms * 1e3 / CHAIN for form in FORMS}
            rate = 4 * batch * tokens * tokens * width / us["PackedAttention"] / 1e3
            rows.append({"batch": batch, "tokens": tokens, "us": us, "gflops": rate})
            if not as_json:
                best = min(us["decomposed"], us["MultiHeadAttention"])
                print(f"{shape}: {', '.join(f'{f} {t:.1f} us' for f, t in us.items())}; "
                      f"{best / us['PackedAttention']:.2f}x, {rate:.0f} Gflop/s", flush=True)  # fmt: skip
    result = {
        "versions": package_versions(), "command": " ".join(sys.argv), "instructions": instruction_set(),
        "heads": heads, "dim": dim, "threads": threads, "rows": rows,
    }  # fmt: skip
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
