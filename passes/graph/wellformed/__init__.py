"""What an ONNX file must be before anything else reads it: whole tensors, nodes as their ops are defined, no cycle."""

from trimtab.passes.graph.wellformed.check import check_model as check_model
