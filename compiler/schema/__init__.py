"""The border: files that trimtab did not write, read by schema and within limits."""
