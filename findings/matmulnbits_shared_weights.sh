#!/bin/bash
# ONNX Runtime 1.31.1 makes no MatMulNBits of block-quantized weights that two products share.
#
# Versions: onnxruntime 1.31.1 (CPU, default options), onnx 1.23.2, numpy 2.4.6; Python 3.11 or later.
#
# A DequantizeLinear in blocks before a MatMul becomes MatMulNBits. One would expect the same where layers share
# weights: two MatMuls behind one DequantizeLinear, or two DequantizeLinears that have their integers or their scales
# in common. Instead none is fused, and nothing is logged by default. The float matrix is then made again in each run,
# so tied weights lose what int4 is for. A copy of the initializers under other names brings the fusion back, at twice
# the size.
#
# Seen, the same for int4 and int8:
#   one MatMul                                     MatMulNBits
#   two MatMuls, a copy of the initializers        MatMulNBits x 2
#   two MatMuls on one DequantizeLinear            DequantizeLinear x 2, MatMul x 2
#   two DequantizeLinears, same integers, scales   DequantizeLinear x 2, MatMul x 2
#   two DequantizeLinears, same integers           DequantizeLinear x 2, MatMul x 2
#   two DequantizeLinears, same scales             DequantizeLinear x 2, MatMul x 2
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
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 128, 64, 32
FIRST = f"w = DequantizeLinear <axis = 0, block_size = {BLOCK}> (q, s)  y = MatMul (x, w)"
SECOND = f" v = DequantizeLinear <axis = 0, block_size = {BLOCK}> ({{}}, {{}})  z = MatMul (x, v)"
FUSED, LEFT = Counter(MatMulNBits=2), Counter(DequantizeLinear=2, MatMul=2)
CASES = [  # name, nodes, outputs, op types of the optimized graph
    ("one MatMul", FIRST, "y", Counter(MatMulNBits=1)),
    ("two MatMuls, a copy of the initializers", FIRST + SECOND.format("q2", "s2"), "yz", FUSED),
    ("two MatMuls on one DequantizeLinear", FIRST + " z = MatMul (x, w)", "yz", LEFT),
    ("two DequantizeLinears, same integers, scales", FIRST + SECOND.format("q", "s"), "yz", LEFT),
    ("two DequantizeLinears, same integers", FIRST + SECOND.format("q", "s2"), "yz", LEFT),
    ("two DequantizeLinears, same scales", FIRST + SECOND.format("q2", "s"), "yz", LEFT),
]


def optimized_ops(model: onnx.ModelProto) -> Counter:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning says that an optimized file is for this machine alone
    options.optimized_model_filepath = "optimized.onnx"
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load("optimized.onnx").graph.node)


print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}, numpy {np.__version__}")
rng, same = np.random.default_rng(0), True
for kind, bits in (("int4", 4), ("int8", 8)):
    data_type, high = getattr(TensorProto, kind.upper()), 2 ** (bits - 1)
    for name, nodes, outputs, wanted in CASES:
        results = ", ".join(f"float[rows, {N}] {output}" for output in outputs)
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21]> g (float[rows, {K}] x) => ({results}) {{ {nodes} }}'
        )
        integers = rng.integers(-high, high, K * N).tolist()
        scales = rng.uniform(0.01, 0.02, (K // BLOCK, N)).astype(np.float32)
        used = {key for node in model.graph.node for key in node.input}
        for key in sorted(used & {"q", "q2"}):
            model.graph.initializer.append(helper.make_tensor(key, data_type, (K, N), integers))
        for key in sorted(used & {"s", "s2"}):
            model.graph.initializer.append(numpy_helper.from_array(scales, key))
        onnx.checker.check_model(model, full_check=True)
        ops = optimized_ops(model)
        print(f"{kind}, {name}: {dict(ops)}")
        same &= ops == wanted
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
