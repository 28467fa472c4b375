"""topk: fine-tune a model whose FFNs keep the activations of the top-k neurons of each token alone (HiRE)."""
