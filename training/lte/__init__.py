"""lte: routers that learn which groups of an FFN's neurons an input needs (arXiv 2402.06126)."""
