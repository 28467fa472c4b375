"""head-topk: exact logits for the tokens that a cheap head expects, cheap ones for the others."""
