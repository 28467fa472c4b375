"""Anything a user has → a Source: an ONNX file that trimtab can read, and what is known about it."""
