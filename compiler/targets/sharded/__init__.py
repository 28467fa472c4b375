"""A model in shards: each process runs the segments of one rank, and the ranks join tensors between segments."""
