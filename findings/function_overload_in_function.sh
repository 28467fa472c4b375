#!/bin/bash
# ONNX Runtime 1.31.1 forgets which overload of a model-local function is meant where another function calls it.
#
# Versions: onnxruntime 1.31.1 (CPU), onnx 1.23.2, numpy 2.4.6; Python 3.11 or later.
#
# From IR version 10 on, functions of one name are told apart by `overload`, which a node gives too. ONNX Runtime heeds
# it in the graph and in the branches of an If. In the body of a function it does not: the call goes to the function of
# the same name without an overload, which gives wrong numbers without a word, and if there is none, no session is
# created. onnx's checker passes all of these models. What helps is to inline functions before (`onnx.inliner`).
# (onnx.reference is no judge here: in onnx 1.23.2 it does not look at overloads at all.)
#
# Seen (F:negative of [1, -2]; the second column with a function F without overload, which is Identity, in the model):
#   called by                     F:negative, F:positive   and F
#   the graph                     [-1, 2]                  [-1, 2]
#   a branch of an If             [-1, 2]                  [-1, 2]
#   an If's branch in function G  [-1, 2]                  [-1, 2]
#   function G                    no session               [1, -2]
#   function G, inlined before    [-1, 2]                  [-1, 2]
#   (no session: Fatal error: local:F(-1) is not a registered function/op)
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnxruntime as ort

OPSETS = 'opset_import: ["" : 21, "local" : 1]'
GRAPH = f"<ir_version: 10, {OPSETS}> g (float[2] x, bool c) => (float[2] y) {{{{ {{}} }}}}"
OVERLOADS = f"""
<domain: "local", overload: "negative", {OPSETS}> F (a) => (b) {{ b = Neg (a) }}
<domain: "local", overload: "positive", {OPSETS}> F (a) => (b) {{ b = Abs (a) }}"""
PLAIN = f'<domain: "local", {OPSETS}> F (a) => (b) {{ b = Identity (a) }}'
CALLER = f'<domain: "local", {OPSETS}> G (a, c) => (b) {{{{ {{}} }}}}'
CALL = "{1} = local.F:negative ({0})"
BRANCH = """{1} = If (c) <then_branch = t () => (float[2] p) {{ p = local.F:negative ({0}) }},
    else_branch = e () => (float[2] q) {{ q = local.F:positive ({0}) }}>"""
RIGHT, WRONG, REFUSED = "[-1.0, 2.0]", "[1.0, -2.0]", "no session"
CASES = [  # name, nodes of the graph, nodes of G, whether inlined before, what comes out without F and with it
    ("the graph", CALL.format("x", "y"), None, False, (RIGHT, RIGHT)),
    ("a branch of an If", BRANCH.format("x", "y"), None, False, (RIGHT, RIGHT)),
    ("an If's branch in function G", "y = local.G (x, c)", BRANCH.format("a", "b"), False, (RIGHT, RIGHT)),
    ("function G", "y = local.G (x, c)", CALL.format("a", "b"), False, (REFUSED, WRONG)),
    ("function G, inlined before", "y = local.G (x, c)", CALL.format("a", "b"), True, (RIGHT, RIGHT)),
]


def outcome(nodes: str, body: str | None, plain: bool, inlined: bool) -> str:
    text = GRAPH.format(nodes) + OVERLOADS + (PLAIN if plain else "") + (CALLER.format(body) if body else "")
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    model = onnx.inliner.inline_local_functions(model) if inlined else model
    try:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        return REFUSED if "local:F(-1) is not a registered function/op" in str(error) else str(error)
    return str(session.run(None, {"x": np.array([1, -2], np.float32), "c": np.array(True)})[0].tolist())


ort.set_default_logger_severity(4)
print(f"onnxruntime {ort.__version__}, onnx {onnx.__version__}")
seen = [tuple(outcome(nodes, body, plain, inlined) for plain in (False, True)) for _, nodes, body, inlined, _ in CASES]
for (name, *_), (without, beside) in zip(CASES, seen, strict=True):
    print(f"{name}: {without}, with F {beside}")
same = seen == [wanted for *_, wanted in CASES]
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
