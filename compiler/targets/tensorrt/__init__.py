"""TensorRT and TensorRT-RTX: one path through Polygraphy's loaders, with the builder in a child process."""

from trimtab.compiler.targets.tensorrt.target import TensorRT, TensorRTRTX

__all__ = ["TensorRT", "TensorRTRTX"]
