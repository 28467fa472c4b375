"""`canonicalize`: rewrites the forms of different exporters into one form, without reading large weights."""

from __future__ import annotations

from typing import ClassVar

import onnx_graphsurgeon as gs

from trimtab.passes.canonicalize.fold import fold_constants, hoist_constants
from trimtab.passes.canonicalize.grids import unfold_grids
from trimtab.passes.canonicalize.heads import size_caches
from trimtab.passes.canonicalize.products import lift_gemms, split_fused_bias
from trimtab.passes.canonicalize.shapes import infer_shapes
from trimtab.passes.canonicalize.simplify import remove_copies, remove_reshapes
from trimtab.passes.canonicalize.unpack import unpack_gates
from trimtab.passes.contract import Pass, PassContext, PassResult
from trimtab.passes.graph.copies import merge_copies


class Canonicalize(Pass):
    """Rewrites every exporter's graph into the forms that `find_anatomy` and the other passes know.

    * Constant nodes become initializers, and small constant expressions are folded.
    * Identity, inference-time Dropout, one-input Concat, and Casts and Reshapes that change nothing are removed.
    * Reshape → Gemm → Reshape (GPT-2's Conv1D) becomes MatMul + Add; a bias fused into an activation becomes an Add.
    * A tensor gathered through a grid of all its own indices (transformers' attention masks) is read directly.
    * Weights that are equal, or equal when transposed, are merged: layers that share a matrix read one constant.
    * A product with packed gate and up projections becomes two, whose weights are parts of its weight.
    * Shapes and types of intermediate tensors are inferred again: some that exporters write contradict inference, and
      tools such as onnxruntime.quantization refuse these.
    * A decoder's cache whose inputs leave the number or width of heads open gets the sizes of its attention.

    Inputs and outputs keep names, types and all other sizes; model-local functions and other domains' nodes stay.
    """

    name: ClassVar[str] = "canonicalize"
    summary: ClassVar[str] = "Rewrite exporters' forms into one; changes no result."

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        details = {
            "constants": hoist_constants(graph),
            "copies": remove_copies(graph),
            "folded": fold_constants(graph),
            "biases": split_fused_bias(graph),
        }
        infer_shapes(graph)
        details["copies"] += remove_copies(graph)  # types are known now, so Casts that change nothing are found
        details["gemms"] = lift_gemms(graph)
        details["reshapes"] = remove_reshapes(graph)
        details["grids"] = unfold_grids(graph)
        details["shared"] = merge_copies(graph)
        details["gates"] = unpack_gates(graph)
        details["caches"] = size_caches(graph)
        graph.cleanup(remove_unused_graph_inputs=False)
        return PassResult(self.name, sum(details.values()), details=details)
