"""FFNs as the dialect's sparse ops, for all passes that choose neurons: rows of weights, and nodes in the graph."""

from __future__ import annotations

from trimtab.passes.sparse_ffn.dial import TokenDial, bars_token_dial
from trimtab.passes.sparse_ffn.emit import SparseFFN, unfit
from trimtab.passes.sparse_ffn.first import FirstProjection
from trimtab.passes.sparse_ffn.rest import Rest, RestOption, fit_rest, report_rest, rest_bytes
from trimtab.passes.sparse_ffn.rest_nodes import RestNodes
from trimtab.passes.sparse_ffn.result import check_sparsity, error_bound, rewritten, too_dense
from trimtab.passes.sparse_ffn.rows import INT4_BLOCK, RowForm, Rows, row_bytes, row_constants

__all__ = [
    "INT4_BLOCK", "FirstProjection", "Rest", "RestNodes", "RestOption", "RowForm", "Rows", "SparseFFN", "TokenDial",
    "bars_token_dial", "check_sparsity", "error_bound", "fit_rest", "report_rest", "rest_bytes", "rewritten",
    "row_bytes", "row_constants", "too_dense", "unfit",
]  # fmt: skip
