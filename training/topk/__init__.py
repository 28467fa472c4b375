"""topk: fine-tune a model whose FFNs keep only the activations of each token's top-k neurons (HiRE)."""
