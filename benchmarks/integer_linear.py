"""Int8Linear and Int4Linear against ONNX Runtime's integer products: python benchmarks/integer_linear.py --json

int8: shapes are those of MiniLM-L6 and BERT-base: attention's projections, q, k and v as one, and an FFN's two
products, of which the first ends in GELU. The peer is what `quantize_dynamic` makes (one scale per output channel) and
ONNX Runtime fuses: DynamicQuantizeMatMul with the bias, and Gelu.

int4 (`--form int4`): shapes are those of SmolLM2-135M: q, k and v as one, attention's output, gate and up as one, down,
and the head. The peer is what ONNX Runtime makes of DequantizeLinear in blocks of 32: MatMulNBits, accuracy_level 4.
A token reads all weights of a model in turn, so a run multiplies with as many matrices as caches do not hold
(`--bytes`), and counts as one of them.

Both write into memory that is there, and take turns run by run; the least time of each counts, since other processes
only ever add to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import typer
from onnx import numpy_helper

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.targets.sessions import session_options
from trimtab.passes.dynamic_int8 import quantize_file
from trimtab.passes.matrices.forms import Quantized
from trimtab.passes.settle import use_int4_linear
from trimtab.plugins import INT8_LINEAR, add_node
from trimtab.plugins.int8_linear import NUMBERS
from trimtab.plugins.library import instruction_set, register

SHAPES = {
    "int8": "384x384,384x1152,384x1536,1536x384,768x768,768x3072,3072x768",
    "int4": "576x960,576x576,576x3072,1536x576,576x49152",
}


class Form(StrEnum):
    """Of the weights."""

    int8 = "int8"
    int4 = "int4"


def models_of(
    form: Form, width: int, outputs: int, size: int, rng: np.random.Generator, folder: Path
) -> dict[str, bytes]:
    """Models of `size` products each, whose outputs are y0, y1, ..., by name: that of trimtab first."""
    if form == "int4":
        made = int4_products(width, outputs, size, rng)
        standard = bytes(gs.export_onnx(made).SerializeToString())
        use_int4_linear(made)
        return {"int4_linear": bytes(gs.export_onnx(made).SerializeToString()), "onnxruntime": standard}
    activation = activation_of(form, width, outputs)
    return {
        "int8_linear": int8_linear(width, outputs, activation, rng),
        "onnxruntime": dynamic_int8(width, outputs, activation, rng, folder),
    }


def activation_of(form: Form, width: int, outputs: int) -> str:
    return "gelu" if form == "int8" and outputs == 4 * width else "identity"


def int4_products(width: int, outputs: int, count: int, rng: np.random.Generator) -> gs.Graph:
    """`count` products of one x with matrices of their own."""
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, ["rows", width])], opset=21, ir_version=10)
    for i in range(count):
        scale = (rng.random((width // 32, outputs)) / width).astype(np.float32)
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        matrix = Quantized(rng.integers(-8, 8, (width, outputs)).astype(np.int8), scale, 4, 32)
        y = matrix.store(f"w{i}", np.dtype(np.float32))(graph, graph.inputs[0], f"y{i}")
        graph.outputs.append(y)
    return graph


def int8_linear(width: int, outputs: int, activation: str, rng: np.random.Generator) -> bytes:
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, ["rows", width])], opset=21, ir_version=10)
    scale = rng.random(outputs, np.float32) / width
    arrays = {"weight": rng.integers(-127, 128, (width, outputs)).astype(np.int8), "weight_scale": scale}
    arrays["bias"] = rng.standard_normal(outputs).astype(np.float32)
    given = {name: gs.Constant(name, array) for name, array in arrays.items()} | {"x": graph.inputs[0]}
    graph.outputs = [add_node(graph, INT8_LINEAR, given, "y0", activation=NUMBERS[activation])]
    return bytes(gs.export_onnx(graph).SerializeToString())


def dynamic_int8(width: int, outputs: int, activation: str, rng: np.random.Generator, folder: Path) -> bytes:
    lines = (
        "p = MatMul(x, w) y0 = Add(p, b)" if activation == "identity" else "p = MatMul(x, w) s = Add(p, b) y0 = Gelu(s)"
    )
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[n, {width}] x) => (float[n, {outputs}] y0) {{ {lines} }}'
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
    """Least time of a product of each, in microseconds."""
    bindings = {}
    for name, each in sessions.items():
        binding = each.io_binding()
        binding.bind_cpu_input("x", x)
        for output in each.get_outputs():
            y = ort.OrtValue.ortvalue_from_numpy(np.zeros((len(x), outputs), np.float32))
            binding.bind_ortvalue_output(output.name, y)
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
    return {name: us / len(sessions[name].get_outputs()) for name, us in least.items()}


def main(
    form: Annotated[Form, typer.Option(help="Of the weights.")] = Form.int8,
    shapes: Annotated[str | None, typer.Option(help="in_features x out_features.")] = None,
    rows: Annotated[str, typer.Option(help="Tokens of all samples together.")] = "1,16,48,128,384,1536",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    size: Annotated[int, typer.Option("--bytes", help="Of the int4 matrices that a run reads, at least.")] = 1 << 27,
    seconds: Annotated[float, typer.Option(help="Of timing per shape, rows and threads.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    rng = np.random.default_rng(0)
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="trimtab-linear-") as folder:
        for shape in (shapes or SHAPES[form]).split(","):
            width, outputs = map(int, shape.split("x"))
            matrices = 1 + 2 * size // (width * outputs)
            models = models_of(form, width, outputs, matrices, rng, Path(folder))
            for count in map(int, threads.split(",")):
                sessions = {name: session(model, count) for name, model in models.items()}
                for tokens in map(int, rows.split(",")):
                    x = rng.standard_normal((tokens, width)).astype(np.float32)
                    least = least_us(sessions, x, outputs, seconds)
                    row = {"shape": shape, "activation": activation_of(form, width, outputs)}
                    row |= {"threads": count, "rows": tokens}
                    row |= {f"{name}_us": round(us, 1) for name, us in least.items()}
                    row |= {"ratio": round(least["onnxruntime"] / least[f"{form}_linear"], 3)}
                    row |= {"gmac_s": round(tokens * width * outputs / least[f"{form}_linear"] / 1e3, 1)}
                    if form == "int4":
                        row |= {"gb_s": round(width * outputs * 0.5625 / least["int4_linear"] / 1e3, 1)}
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
