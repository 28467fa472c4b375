"""Checks an ONNX file before other code reads it: complete tensors, nodes as their ops are defined, no cycle."""

from trimtab.passes.graph.wellformed.check import check_model as check_model
