"""Rewrites the graph of the passes into the nodes that ONNX Runtime computes fastest; results stay the same.

This is not a pass of recipes: the target applies it after all passes.
"""

from trimtab.passes.settle.bias_gelu import fuse_bias_gelu
from trimtab.passes.settle.decoder import tighten_decoder
from trimtab.passes.settle.int4_products import use_int4_linear
from trimtab.passes.settle.integer_products import keep_integer_products

__all__ = ["fuse_bias_gelu", "keep_integer_products", "tighten_decoder", "use_int4_linear"]
