#!/bin/bash
# TensorRT-RTX 1.7.1's ONNX parser refuses a call of a model-local function that leaves out an optional input.
#
# Versions: tensorrt-rtx 1.7.1.116 (parser alone, no GPU needed), onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6; Python 3.11 or
# later, Linux on x86.
#
# ONNX lets a node give fewer inputs than its function has, or an empty name for one. onnx's checker finds the model valid
# and ONNX Runtime runs it. TensorRT-RTX parses the call when every input is given; when one is left out it says "Invalid
# Node", though the body does not read that input. What helps is to inline functions before (`onnx.inliner`).
#
# Seen (nodes of one model, and whether each parser takes it):
#   every input given          ONNX Runtime runs, TensorRT-RTX parses
#   last input left out        ONNX Runtime runs, TensorRT-RTX refuses
#   last input named ""        ONNX Runtime runs, TensorRT-RTX refuses
#   left out, then inlined     ONNX Runtime runs, TensorRT-RTX parses
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6 \
    tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116 tensorrt-rtx==1.7.1.116

cat > "$folder/show.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnxruntime as ort
import tensorrt_rtx as trt

TEXT = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[rows, 4] a) => (float[rows, 4] y) { y = local.Positive (a, a) }
<domain: "local", opset_import: ["" : 21]>
Positive (x, unused) => (z) { z = Relu (x) }"""


def model(inputs: list[str]) -> onnx.ModelProto:
    made = onnx.parser.parse_model(TEXT)
    del made.graph.node[0].input[:]
    made.graph.node[0].input.extend(inputs)
    onnx.checker.check_model(made, full_check=True)
    return made


def runs(made: onnx.ModelProto) -> bool:
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[-1, 2, -3, 4]], np.float32)
    return np.array_equal(session.run(None, {"a": x})[0], np.maximum(x, 0))


def parses(made: onnx.ModelProto) -> bool:
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(logger).create_network(0)
    return trt.OnnxParser(network, logger).parse(made.SerializeToString())


print(f"tensorrt-rtx {trt.__version__}, onnx {onnx.__version__}, onnxruntime {ort.__version__}")
same = True
for name, made, wanted in (
    ("every input given", model(["a", "a"]), True),
    ("last input left out", model(["a"]), False),
    ('last input named ""', model(["a", ""]), False),
    ("left out, then inlined", onnx.inliner.inline_local_functions(model(["a"])), True),
):
    seen = runs(made), parses(made)
    print(f"{name}: ONNX Runtime {'runs' if seen[0] else 'differs'}, TensorRT-RTX {'parses' if seen[1] else 'refuses'}")
    same &= seen == (True, wanted)
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
