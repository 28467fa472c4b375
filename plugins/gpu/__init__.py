"""GPU kernels of the dialect, in the Triton language: one launch per op, as TensorRT's embedded plugins want them.

Needs the package `triton`; nothing else of trimtab imports this package but `plugins/tensorrt` and benchmarks.
"""

from trimtab.plugins.gpu.kernel import GpuKernel, Tile

__all__ = ["GpuKernel", "Tile"]
