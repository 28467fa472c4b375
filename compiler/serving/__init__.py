"""Triton Inference Server on this machine: find or install it, start it, and stop it."""

from trimtab.compiler.serving.build import Serving, serve_build
from trimtab.compiler.serving.process import Ports

__all__ = ["Ports", "Serving", "serve_build"]
