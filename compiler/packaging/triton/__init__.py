"""A build as a model repository of Triton Inference Server."""

from trimtab.compiler.packaging.triton.repository import BACKENDS, Package, check_backend, package_triton

__all__ = ["BACKENDS", "Package", "check_backend", "package_triton"]
