"""Reading foreign files: files that trimtab did not write, validated by a schema and within limits."""
