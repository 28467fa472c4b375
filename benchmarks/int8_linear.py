"""Int8Linear against ONNX Runtime's dynamic int8 products: python benchmarks/int8_linear.py --json

Shapes are those of MiniLM-L6 and BERT-base: attention's projections, q, k and v as one, and an FFN's two products, of
which the first ends in GELU. The peer is what `quantize_dynamic` makes (one scale per output channel) and ONNX Runtime
fuses: DynamicQuantizeMatMul with the bias, and Gelu. Both write into memory that is there, and take turns run by run;
the least time of each counts, since other processes only ever add to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import typer
from onnx import numpy_helper

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.targets.sessions import session_options
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.plugins import INT8_LINEAR, add_node
from trimtab.plugins.int8_linear import NUMBERS
from trimtab.plugins.library import instruction_set, register

SHAPES = "384x384,384x1152,384x1536,1536x384,768x768,768x3072,3072x768"


def ours(width: int, outputs: int, activation: str, rng: np.random.Generator) -> bytes:
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, ["rows", width])], opset=21, ir_version=10)
    scale = rng.random(outputs, np.float32) / width
    arrays = {"weight": rng.integers(-127, 128, (width, outputs)).astype(np.int8), "weight_scale": scale}
    arrays["bias"] = rng.standard_normal(outputs).astype(np.float32)
    given = {name: gs.Constant(name, array) for name, array in arrays.items()} | {"x": graph.inputs[0]}
    graph.outputs = [add_node(graph, INT8_LINEAR, given, "y", activation=NUMBERS[activation])]
    return bytes(gs.export_onnx(graph).SerializeToString())


def peer(width: int, outputs: int, activation: str, rng: np.random.Generator, folder: Path) -> bytes:
    lines = (
        "p = MatMul(x, w) y = Add(p, b)" if activation == "identity" else "p = MatMul(x, w) s = Add(p, b) y = Gelu(s)"
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[n, {width}] x) => (float[n, {outputs}] y) {{ {lines} }}'
    )
    arrays = {"w": rng.standard_normal((width, outputs)) / np.sqrt(width), "b": rng.standard_normal(outputs)}
    model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items())
    onnx.save(model, folder / "dense.onnx")
    quantize_file(folder / "dense.onnx", folder / "int8.onnx")
    return (folder / "int8.onnx").read_bytes()


def session(model: bytes, threads: int) -> ort.InferenceSession:
    options = session_options(threads, spinning=True)
    if not register(options):
        sys.exit("the native kernels are missing")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def least_us(
    sessions: dict[str, ort.InferenceSession], x: np.ndarray, outputs: int, seconds: float
) -> dict[str, float]:
    """Least time of a run of each, in microseconds."""
    bindings = {}
    for name, each in sessions.items():
        binding = each.io_binding()
        binding.bind_cpu_input("x", x)
        y = ort.OrtValue.ortvalue_from_numpy(np.zeros((len(x), outputs), np.float32))
        binding.bind_ortvalue_output("y", y)
        bindings[name] = binding
    least = dict.fromkeys(sessions, float("inf"))
    end, turns = time.perf_counter() + seconds, 0
    while turns < 6 or time.perf_counter() < end:
        turns += 1
        for name, each in sessions.items():
            for _ in range(3):
                start = time.perf_counter()
                each.run_with_iobinding(bindings[name])
                least[name] = min(least[name], 1e6 * (time.perf_counter() - start))
    return least


def main(
    shapes: Annotated[str, typer.Option(help="in_features x out_features.")] = SHAPES,
    rows: Annotated[str, typer.Option(help="Tokens of all samples together.")] = "1,16,48,128,384,1536",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    seconds: Annotated[float, typer.Option(help="Of timing per shape, rows and threads.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    rng = np.random.default_rng(0)
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-int8-") as folder:
        for shape in shapes.split(","):
            width, outputs = map(int, shape.split("x"))
            activation = "gelu" if outputs == 4 * width else "identity"
            models = {
                "int8_linear": ours(width, outputs, activation, rng),
                "onnxruntime": peer(width, outputs, activation, rng, Path(folder)),
            }
            for count in map(int, threads.split(",")):
                sessions = {name: session(model, count) for name, model in models.items()}
                for tokens in map(int, rows.split(",")):
                    x = rng.standard_normal((tokens, width)).astype(np.float32)
                    least = least_us(sessions, x, outputs, seconds)
                    row = {"shape": shape, "activation": activation, "threads": count, "rows": tokens}
                    row |= {f"{name}_us": round(us, 1) for name, us in least.items()}
                    row |= {"ratio": round(least["onnxruntime"] / least["int8_linear"], 3)}
                    row |= {"gmac_s": round(tokens * width * outputs / least["int8_linear"] / 1e3, 1)}
                    found.append(row)
                    if not as_json:
                        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    result = {"versions": package_versions(), "command": " ".join(sys.argv), "instructions": instruction_set()}
    text = json.dumps(result | {"rows": found}, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)


if __name__ == "__main__":
    typer.run(main)
