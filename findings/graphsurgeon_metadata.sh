#!/bin/bash
# Graph Surgeon 0.6.1 writes models without their metadata, domain, version and description, and says nothing.
#
# Versions: onnx-graphsurgeon 0.6.1, onnx 1.23.2, onnxruntime 1.31.1, numpy 2.4.6; Python 3.11 or later.
#
# ONNX keeps what applications need to know of a model in metadata_props, such as the names of classes; ONNX Runtime
# hands them out as custom_metadata_map. To import a model and export it, with no change between, loses them, and those
# of the graph, its nodes and values, and the descriptions of nodes and values. The producer, the IR version, and the
# name and description of the graph stay. Nothing is logged. What helps is to copy the fields from the first model to
# the second, which for nodes that were changed has to be done by name.
#
# Seen (what of it is left after import and export):
#   kept   producer_name, producer_version, ir_version, graph.name, graph.doc_string, node.name
#   lost   metadata_props, domain, model_version, doc_string, graph.metadata_props, node.metadata_props,
#          node.doc_string, input.metadata_props, input.doc_string
#   ONNX Runtime's custom_metadata_map   before {'names': 'cat,dog'}   after {}
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

import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort

MODEL = """<ir_version: 10, opset_import: ["" : 21], producer_name: "maker", producer_version: "2",
    domain: "animals", model_version: 3, doc_string: "Tells animals apart.", metadata_props: ["names": "cat,dog"]>
g (float[2] x) => (float[2] y) { [first] y = Neg (x) }"""
KEPT = ["producer_name", "producer_version", "ir_version", "graph.name", "graph.doc_string", "node.name"]
LOST = ["metadata_props", "domain", "model_version", "doc_string", "graph.metadata_props", "node.metadata_props"]
LOST += ["node.doc_string", "input.metadata_props", "input.doc_string"]


def field(model: onnx.ModelProto, path: str) -> object:
    *owner, name = path.split(".")
    owners = {"graph": model.graph, "node": model.graph.node[0], "input": model.graph.input[0]}
    value = getattr(owners[owner[0]] if owner else model, name)
    return {entry.key: entry.value for entry in value} if name == "metadata_props" else value


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map


print(f"onnx-graphsurgeon {gs.__version__}, onnx {onnx.__version__}, onnxruntime {ort.__version__}")
model, said = onnx.parser.parse_model(MODEL), io.StringIO()
for owner in (model.graph, model.graph.node[0], model.graph.input[0]):
    owner.doc_string = "What it is for."
    owner.metadata_props.add(key="origin", value="training")
onnx.checker.check_model(model, full_check=True)
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    exported = gs.export_onnx(gs.import_onnx(model))
onnx.checker.check_model(exported, full_check=True)
kept = [path for path in KEPT + LOST if field(exported, path) == field(model, path)]
lost = [path for path in KEPT + LOST if field(model, path) and not field(exported, path)]
print(f"kept: {', '.join(kept)}\nlost: {', '.join(lost)}\nlogged: {said.getvalue() or 'nothing'}")
print(f"custom_metadata_map: before {metadata(model)}, after {metadata(exported)}")
same = (kept, lost, said.getvalue()) == (KEPT, LOST, "")
same &= (metadata(model), metadata(exported)) == ({"names": "cat,dog"}, {})
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
