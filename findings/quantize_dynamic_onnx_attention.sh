#!/bin/bash
# quantize_dynamic of ONNX Runtime 1.31.1 turns ONNX's own Attention into com.microsoft QAttention, which cannot be
# loaded.
#
# Versions: onnxruntime 1.31.1 (CPU), onnx 1.23.2, numpy 2.4.6; Python 3.11 or later.
#
# Attention of opset 23 takes query, key and value; com.microsoft's Attention takes one input and the weight and bias
# of its projections. The quantizer goes by the name of the operator, not its domain. One would expect that it leaves
# the node alone, which holds no weight, and quantizes the MatMul before it. Instead it makes a QAttention of query,
# key and value, and ONNX Runtime refuses the model. ONNX Runtime runs the float model. Without "Attention" in
# op_types_to_quantize all is well.
#
# Seen:
#   float                MatMul, Attention                         runs
#   default arguments    MatMulInteger, com.microsoft QAttention   refused (INVALID_GRAPH, unrecognized attribute)
#   without Attention    MatMulInteger, Attention                  runs
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import logging
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic

WIDTH, HEADS = 32, 4
MODEL = f"""<ir_version: 11, opset_import: ["" : 23]>
g (float[batch, tokens, {WIDTH}] x) => (float[batch, tokens, {WIDTH}] y) {{
    q = MatMul (x, w)
    y = Attention <q_num_heads = {HEADS}, kv_num_heads = {HEADS}> (q, x, x)
}}"""


def outcome(path: str, x: np.ndarray) -> str:
    try:
        (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    except Exception as error:
        return f"refused: {error}".replace("\n", " ")
    return f"runs, shape {y.shape}"


logging.getLogger().setLevel(logging.ERROR)
print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, numpy {np.__version__}")
rng, same = np.random.default_rng(0), True
x = rng.normal(size=(2, 5, WIDTH)).astype(np.float32)
model = onnx.parser.parse_model(MODEL)
model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), "w"))
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float.onnx")
saw = outcome("float.onnx", x)
print(f"float: {', '.join(node.op_type for node in model.graph.node)}; {saw}")
same &= saw.startswith("runs")
for case, op_types, wanted, result in (
    ("default arguments", None, ["MatMulInteger", "com.microsoft QAttention"], "refused"),
    ("without Attention", ["MatMul"], ["MatMulInteger", "Attention"], "runs"),
):
    quantize_dynamic("float.onnx", "int8.onnx", op_types_to_quantize=op_types)
    nodes = onnx.load("int8.onnx").graph.node
    names = [f"{node.domain} {node.op_type}".strip() for node in nodes]
    ops, saw = [name for name in names if "Attention" in name or "MatMul" in name], outcome("int8.onnx", x)
    print(f"{case}: {', '.join(ops)}; {saw}")
    same &= ops == wanted and saw.startswith(result)
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
