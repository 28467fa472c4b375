"""A model in any supported format → a Source: an ONNX file that trimtab can read, and facts about the model."""

from trimtab.compiler.sources.from_torch import from_torch
from trimtab.compiler.sources.open import model_path, open_source
from trimtab.compiler.sources.source import Source

__all__ = ["Source", "from_torch", "model_path", "open_source"]
