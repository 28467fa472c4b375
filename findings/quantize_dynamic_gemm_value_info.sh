#!/bin/bash
# quantize_dynamic of ONNX Runtime 1.31.1 fails on a Gemm with transB when value_info lists the shape of its weight.
#
# Versions: onnxruntime 1.31.1, onnx 1.23.2, numpy 2.4.6; Python 3.11 or later.
#
# value_info may list any value of the graph, so an initializer too (onnx-ir 1.1.0 writes such entries), and the shape
# that it gives here is right. One would expect that it changes nothing. But the quantizer transposes the weight in
# place, keeps the entry, and then infers shapes: they differ from the entry, which was right before. The same model
# without the entry is quantized, and so are a MatMul and a Gemm of a square weight with it.
#
# Seen:
#   MatMul, weight in value_info             quantized
#   Gemm with transB                         quantized
#   Gemm with transB, weight in value_info   InferenceError: Inferred shape and existing shape differ in dimension 0
#   the same, square weight                  quantized
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
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

MATMUL, GEMM = "y = MatMul (x, w)", "y = Gemm <transB = 1> (x, w)"
CASES = [  # name, node, shape of the weight, whether value_info lists it, whether the quantizer fails
    ("MatMul, weight in value_info", MATMUL, (128, 64), True, False),
    ("Gemm with transB", GEMM, (64, 128), False, False),
    ("Gemm with transB, weight in value_info", GEMM, (64, 128), True, True),
    ("the same, square weight", GEMM, (128, 128), True, False),
]


def outcome() -> str:
    try:
        quantize_dynamic("float.onnx", "int8.onnx")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "quantized: " + ", ".join(node.op_type for node in onnx.load("int8.onnx").graph.node)


logging.getLogger().setLevel(logging.ERROR)
print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, numpy {np.__version__}")
rng, same = np.random.default_rng(0), True
for name, node, shape, listed, fails in CASES:
    width, features = shape if node is MATMUL else shape[::-1]
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> '
        f"g (float[rows, {width}] x) => (float[rows, {features}] y) {{ {node} }}"
    )
    model.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), "w"))
    if listed:
        model.graph.value_info.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, shape))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "float.onnx")
    saw = outcome()
    print(f"{name}: {saw}")
    same &= "Inferred shape and existing shape differ" in saw if fails else "MatMulInteger" in saw
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
