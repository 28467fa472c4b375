"""FFNs in the sparse ops of the dialect, whatever chooses their neurons: rows of weights, and the ops in place."""

from __future__ import annotations

from trimtab.passes.sparse_ffn.dial import TokenDial
from trimtab.passes.sparse_ffn.emit import SparseFFN, unfit
from trimtab.passes.sparse_ffn.first import FirstProjection
from trimtab.passes.sparse_ffn.rows import INT4_BLOCK, RowForm, Rows, row_bytes, row_constants

__all__ = [
    "INT4_BLOCK", "FirstProjection", "RowForm", "Rows", "SparseFFN", "TokenDial", "row_bytes", "row_constants", "unfit",
]  # fmt: skip
