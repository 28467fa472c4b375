"""What a target cannot do, as standard ops that it can: the dialect, ONNX Runtime's own ops, TopK of many.

No pass of recipes: a target asks for it when it builds, and the build keeps the graph as it was beside the engine.
"""

from trimtab.passes.lower.lower import lower, tell_head_dim

__all__ = ["lower", "tell_head_dim"]
