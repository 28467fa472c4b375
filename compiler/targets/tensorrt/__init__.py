"""TensorRT and TensorRT-RTX: one path through Polygraphy's loaders, with the builder in a child process.

The child imports as little of this as it can: what follows here would be its start.
"""
