"""ffn-topk: compute only the neurons of an FFN that a cheap predictor expects to matter for a token (HiRE)."""
