"""TensorRT and TensorRT-RTX: one path through Polygraphy's loaders, with the builder in a child process.

This file imports nothing, so that the child process starts fast.
"""
