"""The graph that passes rewrite: an onnx_graphsurgeon.Graph whose weights stay on disk until a pass reads them."""

from trimtab.passes.graph.edit import constant, insert, output_name_of, rename_output, replace_uses, split_last
from trimtab.passes.graph.io import load_graph, save_graph
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.scratch import is_new, scratch
from trimtab.passes.graph.weights import fingerprint, is_external, stored_bytes, values

__all__ = [
    "constant",
    "fingerprint",
    "insert",
    "is_external",
    "is_new",
    "load_graph",
    "output_name_of",
    "rename_output",
    "replace_uses",
    "save_graph",
    "scratch",
    "split_last",
    "stored_bytes",
    "topological",
    "values",
]
