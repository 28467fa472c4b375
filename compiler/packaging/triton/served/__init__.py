"""Models for Triton's Python backend. A repository carries these modules, so the server does not need trimtab."""
