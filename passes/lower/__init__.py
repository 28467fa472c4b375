"""What a target cannot do, as standard ops that it can: the dialect, ONNX Runtime's own ops, TopK of many.

No pass of recipes: a target asks for it when it builds, and the build keeps the graph as it was beside the engine.
"""

from trimtab.passes.lower.bias_gelu import fuse_bias_gelu
from trimtab.passes.lower.integer_products import keep_integer_products
from trimtab.passes.lower.lower import lower, tell_head_dim

__all__ = ["fuse_bias_gelu", "keep_integer_products", "lower", "tell_head_dim"]
