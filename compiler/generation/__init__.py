"""Text generation with a compiled decoder."""

from trimtab.compiler.generation.generator import NONE, generate
from trimtab.compiler.generation.sampling import Sampling

__all__ = ["NONE", "Sampling", "generate"]
