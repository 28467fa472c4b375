#!/bin/bash
# Graph Surgeon 0.6.1 takes an unused input from a model-local function, and leaves it in the calls.
#
# Versions: onnx-graphsurgeon 0.6.1, onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6; Python 3.11 or later.
#
# `Graph.cleanup(remove_unused_graph_inputs=True)` is to remove inputs of the graph that nothing reads. By default it goes
# into local functions, too, and takes their unused inputs for the graph's. The inputs of a function are its signature:
# calls go by position, and still give as many values as before. onnx.checker accepts what comes out, and ONNX Runtime
# does not load it. With `recurse_functions=False` the file is right.
#
# Seen:
#   as it is                                                  F(a, b), called with x, z; runs
#   cleanup()                                                 F(a, b), called with x, z; runs
#   remove_unused_graph_inputs=True                           F(a), called with x, z; checker passes, no session
#   remove_unused_graph_inputs=True, recurse_functions=False  F(a, b), called with x, z; runs
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    onnx-graphsurgeon==0.6.1 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort

MODEL = """
<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
g (float[2] x, float[2] z) => (float[2] o) { o = local.F (x, z) }
<domain: "local", opset_import: ["" : 17]>
F (a, b) => (y) { y = Neg (a) }
"""
UNUSED = {"remove_unused_graph_inputs": True}
CASES = [  # options of cleanup, or None where it is not called; whether a session can be made of the result
    (None, True),
    ({}, True),
    (UNUSED, False),
    (UNUSED | {"recurse_functions": False}, True),
]

print(", ".join(f"{name} {version(name)}" for name in ("onnx-graphsurgeon", "onnx", "onnxruntime")))
ort.set_default_logger_severity(4)
same = True
for options, runs in CASES:
    model = onnx.parser.parse_model(MODEL)
    if options is not None:
        graph = gs.import_onnx(model)
        graph.cleanup(**options)
        model = gs.export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    has, given = list(model.functions[0].input), list(model.graph.node[0].input)
    try:
        session = ort.InferenceSession(model.SerializeToString())
        feeds = {tensor.name: np.ones(2, np.float32) for tensor in session.get_inputs()}
        saw = f"gives {session.run(None, feeds)[0].tolist()}"
    except Exception as error:
        saw = f"no session: {type(error).__name__}"
    print(f"{'as it is' if options is None else options}: F({', '.join(has)}), called with {', '.join(given)}; {saw}")
    same &= given == ["x", "z"] and has == (["a", "b"] if runs else ["a"]) and saw.startswith("gives" if runs else "no")
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
