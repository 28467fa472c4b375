"""ffn-threshold: leave out the neurons of an FFN whose activations are small for a token (CATS, TEAL); no training."""
