"""A build as a model repository of Triton Inference Server."""

from trimtab.compiler.packaging.triton.repository import BACKENDS, Package, check_backend, check_package, package_triton

__all__ = ["BACKENDS", "Package", "check_backend", "check_package", "package_triton"]
