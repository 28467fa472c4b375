#!/bin/bash
# quantize_dynamic of ONNX Runtime 1.31.1 writes a wrong model where a Gemm with transB shares its weight.
#
# Versions: onnxruntime 1.31.1 (CPU), onnx 1.23.2, numpy 2.4.6, sympy 1.14.0; Python 3.11 or later.
#
# The quantizer makes a MatMul of each Gemm. It transposes the weight of a Gemm with transB in place, under the same
# name, whatever else reads it. One would expect the error of int8, about 1 %, as where each Gemm has a weight of its
# own. Instead a square table that Gather and Gemm share gives wrong numbers without a word, and so does a square
# weight of two Gemms, which is transposed twice. Other shapes give a model that cannot be loaded. Pre-processing
# changes nothing.
#
# Seen, raw and pre-processed (relative error of the first output against the float model):
#   two Gemms, weights apart, 64 x 64     0.011
#   two Gemms, one weight, 64 x 64        1.516
#   Gather and Gemm, one table, 64 x 64   1.303
#   two Gemms, one weight, 96 x 64        refused (incompatible dimensions)
#   Gather and Gemm, one table, 96 x 64   refused (incompatible dimensions)
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6 sympy==1.14.0

cat > "$folder/show.py" <<'PYTHON'
import logging
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper
from onnxruntime.quantization import quant_pre_process, quantize_dynamic

WIDTH = 64
TWO = "y = Gemm <transB = 1> (x, w)  z = Gemm <transB = 1> (x, {})"
TIED = "x = Gather (w, ids)  y = Gemm <transB = 1> (x, w)"
CASES = [  # name, nodes, rows of the weight, what becomes of the quantized model
    ("two Gemms, weights apart", TWO.format("v"), 64, "right"),
    ("two Gemms, one weight", TWO.format("w"), 64, "wrong"),
    ("Gather and Gemm, one table", TIED, 64, "wrong"),
    ("two Gemms, one weight", TWO.format("w"), 96, "refused"),
    ("Gather and Gemm, one table", TIED, 96, "refused"),
]


def run(path: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def outcome(path: str, feeds: dict[str, np.ndarray]) -> tuple[str, str]:
    exact = run("float.onnx", feeds)
    quantize_dynamic(path, "int8.onnx")
    try:
        y = run("int8.onnx", feeds)
    except Exception as error:
        return "refused", str(error).replace("\n", " ")
    error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
    return "right" if error < 0.2 else "wrong" if error > 0.5 else "between", f"relative error {error:.3f}"


logging.getLogger().setLevel(logging.ERROR)
ort.set_default_logger_severity(4)
print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, numpy {np.__version__}")
rng, same = np.random.default_rng(0), True
for name, nodes, rows, wanted in CASES:
    tied = nodes is TIED
    feeds = {"ids": np.arange(5)} if tied else {"x": rng.normal(size=(5, WIDTH)).astype(np.float32)}
    given = "int64[n] ids" if tied else f"float[n, {WIDTH}] x"
    results = f"float[n, {rows}] y" + ("" if tied else f", float[n, {rows}] z")
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]> g ({given}) => ({results}) {{ {nodes} }}'
    )
    for key in ("w", "v"):
        if any(key in node.input for node in model.graph.node):
            weight = rng.normal(size=(rows, WIDTH)).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(weight, key))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "float.onnx")
    quant_pre_process("float.onnx", "pre-processed.onnx")
    for kind, path in (("raw", "float.onnx"), ("pre-processed", "pre-processed.onnx")):
        verdict, detail = outcome(path, feeds)
        print(f"{name}, {rows} x {WIDTH}, {kind}: {verdict}, {detail}")
        same &= verdict == wanted
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
