#!/bin/bash
# ONNX Runtime 1.31.1 computes a quantized MatMul with a bias in float when its input has two dimensions.
#
# Versions: onnxruntime 1.31.1 (CPU, default options), onnx 1.23.2, numpy 2.4.6; Python 3.11 or later.
#
# QuantizeLinear and DequantizeLinear come before a MatMul with int8 weights, an Add of a float bias follows, and the
# result stays float. One would expect the same kernel whatever the rank of the input. With three dimensions it is an
# integer product. With two, MatMul and Add become a Gemm, which stays in float where the bias is float: the weight is
# dequantized in each run. Without the bias, or with a bias in int32 behind a DequantizeLinear, rank 2 is an integer
# product too.
#
# Seen (products and DequantizeLinears of the optimized graph):
#   rank 3, float bias   MatMulIntegerToFloat
#   rank 2, float bias   Gemm, DequantizeLinear x 2
#   rank 2, no bias      MatMulIntegerToFloat
#   rank 2, int32 bias   QGemm
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import sys
from collections import Counter

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from onnx import numpy_helper

K, N = 128, 64
SHOWN = {"Gemm", "QGemm", "MatMul", "MatMulIntegerToFloat", "DequantizeLinear"}
PAIR = """xq = QuantizeLinear (x, sx, zx)  xd = DequantizeLinear (xq, sx, zx)
    w = DequantizeLinear (wq, sw, zw)"""
FLOAT_BIAS = PAIR + " h = MatMul (xd, w)  y = Add (h, b)"
CASES = [  # name, dimensions before the last, nodes, op types of the optimized graph
    ("rank 3, float bias", "batch, tokens", FLOAT_BIAS, Counter(MatMulIntegerToFloat=1)),
    ("rank 2, float bias", "rows", FLOAT_BIAS, Counter(Gemm=1, DequantizeLinear=2)),
    ("rank 2, no bias", "rows", PAIR + " y = MatMul (xd, w)", Counter(MatMulIntegerToFloat=1)),
    (
        "rank 2, int32 bias",
        "rows",
        PAIR + " b32 = DequantizeLinear (bq, sb)  h = MatMul (xd, w)  y = Add (h, b32)",
        Counter(QGemm=1),
    ),
]


def optimized_ops(model: onnx.ModelProto) -> Counter:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning says that an optimized file is for this machine alone
    options.optimized_model_filepath = "optimized.onnx"
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load("optimized.onnx").graph.node if node.op_type in SHOWN)


print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, numpy {np.__version__}")
rng, same = np.random.default_rng(0), True
tensors = {
    "sx": np.float32(0.02),
    "zx": np.uint8(128),
    "wq": rng.integers(-127, 128, (K, N)).astype(np.int8),
    "sw": np.float32(0.01),
    "zw": np.int8(0),
    "b": rng.normal(size=N).astype(np.float32),
    "bq": rng.integers(-5000, 5000, N).astype(np.int32),
    "sb": np.float32(0.02) * np.float32(0.01),
}
for name, lead, nodes, wanted in CASES:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : 17]> g (float[{lead}, {K}] x) => (float[{lead}, {N}] y) {{ {nodes} }}'
    )
    used = {key for node in model.graph.node for key in node.input} & set(tensors)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(tensors[key]), key) for key in sorted(used))
    onnx.checker.check_model(model, full_check=True)
    ops = optimized_ops(model)
    print(f"{name}: {dict(ops)}")
    same &= ops == wanted
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
