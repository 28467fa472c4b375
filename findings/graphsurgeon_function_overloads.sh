#!/bin/bash
# Graph Surgeon 0.6.1 writes functions without their `overload`, so a model with two overloads cannot be loaded again.
#
# Versions: onnx-graphsurgeon 0.6.1, onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6; Python 3.11 or later.
#
# From IR version 10 on, model-local functions of one domain and name are told apart by `overload`, which the nodes that
# call them give too. To import a model and export it, with no change between, drops the field from functions and nodes,
# and nothing is logged. Two functions then have one identity, which the checker and ONNX Runtime refuse, and the file
# does not say any more which of them a node calls. What helps is to inline functions before (`onnx.inliner`).
#
# Seen:
#   as it is                F:negative, F:positive; called F:negative, F:positive; gives [0.0, 4.0]
#   imported and exported   F, F; called F, F; not valid; no session
#   inlined before          gives [0.0, 4.0]
#   (not valid: Model contains multiple local functions with the same implementation id 'local::F'.)
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    onnx-graphsurgeon==0.6.1 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import contextlib
import io
import sys

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort

MODEL = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
g (float[2] x) => (float[2] y) { n = local.F:negative (x)  p = local.F:positive (x)  y = Add (n, p) }
<domain: "local", overload: "negative", opset_import: ["" : 21]> F (a) => (b) { b = Neg (a) }
<domain: "local", overload: "positive", opset_import: ["" : 21]> F (a) => (b) { b = Abs (a) }"""
BOTH, GIVES = "F:negative, F:positive", "gives [0.0, 4.0]"


def described(model: onnx.ModelProto) -> str:
    functions = ", ".join(f"{function.name}:{function.overload}".rstrip(":") for function in model.functions)
    calls = ", ".join(f"{node.op_type}:{node.overload}".rstrip(":") for node in model.graph.node if node.domain)
    parts = [functions, f"called {calls}"] if functions else []
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        parts.append("not valid" if "same implementation id 'local::F'" in str(error) else str(error))
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        parts.append(f"gives {session.run(None, {'x': np.array([1, -2], np.float32)})[0].tolist()}")
    except Exception:
        parts.append("no session")
    return "; ".join(parts)


print(f"onnx-graphsurgeon {gs.__version__}, onnx {onnx.__version__}, onnxruntime {ort.__version__}")
ort.set_default_logger_severity(4)
model, said, same = onnx.parser.parse_model(MODEL), io.StringIO(), True
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    exported = gs.export_onnx(gs.import_onnx(model))
    inlined = gs.export_onnx(gs.import_onnx(onnx.inliner.inline_local_functions(model)))
for name, result, wanted in (
    ("as it is", model, f"{BOTH}; called {BOTH}; {GIVES}"),
    ("imported and exported", exported, "F, F; called F, F; not valid; no session"),
    ("inlined before", inlined, GIVES),
):
    saw = described(result)
    print(f"{name}: {saw}")
    same &= saw == wanted
same &= said.getvalue() == ""
print(f"logged: {said.getvalue() or 'nothing'}", "as described above" if same else "CHANGED", sep="\n")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
