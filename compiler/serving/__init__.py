"""Triton Inference Server on this machine: found or installed, started, and stopped."""

from trimtab.compiler.serving.build import Serving, serve_build
from trimtab.compiler.serving.process import Ports

__all__ = ["Ports", "Serving", "serve_build"]
