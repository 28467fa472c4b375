#!/bin/bash
# ONNX Runtime 1.31.1 on the CPU: a sum and its LayerNormalization take several times longer fused than as two nodes.
#
# Versions: onnxruntime 1.31.1 and 1.23.2 (CPU, two threads), onnx 1.19.1, numpy 2.3.5; Python 3.11 or later.
#
# Add and LayerNormalization behind it become one SkipLayerNormalization by the default optimizations, as in every BERT.
# One would expect the one node, which passes over memory once, to take less time than the two. In 1.23.2 it does. In
# 1.31.1 it takes 4 to 5 times as long as in 1.23.2, and so longer than the two nodes. They stay two with the session
# entry optimization.disable_specified_optimizers = SkipLayerNormFusion.
#
# Seen (microseconds for 384 rows of 384 float32, AMD EPYC with AVX-512; of a chain of six, median of 100 runs):
#   onnxruntime 1.23.2   two nodes 77   fused 51
#   onnxruntime 1.31.1   two nodes 67   fused 294
#
# Exits with 0 as long as fused nodes are the slower ones in 1.31.1, and the quicker ones in 1.23.2; with 1 when that has
# changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

cat > "$folder/show.py" <<'PYTHON'
import statistics
import sys
import time

import numpy as np
import onnx.parser
import onnxruntime as ort

WIDTH, CHAIN, RUNS = 384, 6, 100
NODES = "\n".join(
    f"a{i} = Add (x{i}, residual)\nx{i + 1} = LayerNormalization <axis = -1> (a{i}, scale, bias)" for i in range(CHAIN)
)
MODEL = f"""
<ir_version: 9, opset_import: ["" : 20]>
g (float[batch, tokens, {WIDTH}] x0, float[batch, tokens, {WIDTH}] residual) => (float[batch, tokens, {WIDTH}] x{CHAIN})
<float[{WIDTH}] scale = {{{", ".join(["1.5"] * WIDTH)}}}, float[{WIDTH}] bias = {{{", ".join(["0.5"] * WIDTH)}}}>
{{
{NODES}
}}"""


def microseconds(fused: bool) -> float:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    if not fused:
        options.add_session_config_entry("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
    model = onnx.parser.parse_model(MODEL).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((8, 48, WIDTH), np.float32) for name in ("x0", "residual")}
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / CHAIN


two, fused = microseconds(False), microseconds(True)
print(f"onnxruntime {ort.__version__}   two nodes {two:.0f}   fused {fused:.0f}")
slower = fused > 1.5 * two
sys.exit(0 if slower == (sys.argv[1] == "slower") else 1)
PYTHON

for pair in 1.23.2:quicker 1.31.1:slower; do
  python3 -m venv "$folder/${pair%:*}"
  "$folder/${pair%:*}/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==${pair%:*}" onnx==1.19.1 numpy==2.3.5
  "$folder/${pair%:*}/bin/python" "$folder/show.py" "${pair#*:}" || { echo "the behaviour has changed"; exit 1; }
done
