"""The dialect: the few ops that ONNX lacks, one folder per op.

An op's folder holds its schema, its reference body in standard ONNX ops, and its kernels; one op is one kernel launch.
"""

from trimtab.plugins.dialect import DOMAIN, Op
from trimtab.plugins.emit import add_node
from trimtab.plugins.select_blocks import SELECT_BLOCKS
from trimtab.plugins.sparse_down import SPARSE_DOWN
from trimtab.plugins.sparse_head import SPARSE_HEAD
from trimtab.plugins.sparse_up import SPARSE_UP

OPS = {op.name: op for op in (SELECT_BLOCKS, SPARSE_UP, SPARSE_DOWN, SPARSE_HEAD)}
"""Name → op."""

__all__ = ["DOMAIN", "OPS", "SELECT_BLOCKS", "SPARSE_DOWN", "SPARSE_HEAD", "SPARSE_UP", "Op", "add_node"]
