"""A model that several processes compute together: the ranks' graphs in segments, and what they do between them."""
