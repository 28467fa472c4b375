"""What passes have made, as ONNX Runtime computes it best: the same results and layers, in fewer or faster nodes.

No pass of recipes: the target asks for it when all passes have run.
"""

from trimtab.passes.settle.bias_gelu import fuse_bias_gelu
from trimtab.passes.settle.decoder import tighten_decoder
from trimtab.passes.settle.int4_products import use_int4_linear
from trimtab.passes.settle.integer_products import keep_integer_products

__all__ = ["fuse_bias_gelu", "keep_integer_products", "tighten_decoder", "use_int4_linear"]
