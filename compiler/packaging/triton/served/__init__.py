"""Models for Triton's Python backend. A repository carries these modules, so that the server needs no trimtab."""
