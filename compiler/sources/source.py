"""What every kind of model becomes: an ONNX file, and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import onnx_graphsurgeon as gs

from trimtab.passes.contract import PassContext
from trimtab.passes.graph.io import load_graph, model_fingerprint


@dataclass(frozen=True)
class Source:
    """A model to compile.

    Attributes:
        origin: what the user gave: a path, or the class of a torch module.
        onnx: its ONNX file, the user's own or an exported one in the cache. Not to be written to.
        tokenizer: folder with its tokenizer, or None.
        labels: names of its classes, in the order of its logits, or None.
        max_tokens: the longest text that it takes, or None if unknown.
        kind: what it was made from.
    """

    origin: str
    onnx: Path
    tokenizer: Path | None
    labels: tuple[str, ...] | None
    max_tokens: int | None
    kind: Literal["huggingface", "torch", "onnx"]

    def graph(self) -> gs.Graph:
        """A new canonical graph, whose weights stay on disk until something reads them."""
        from trimtab.passes.canonicalize import Canonicalize

        graph = load_graph(self.onnx)
        Canonicalize().run(graph, PassContext())
        return graph

    @cached_property
    def fingerprint(self) -> str:
        """`model_fingerprint` of the ONNX file: what a Profile of this model carries."""
        return model_fingerprint(load_graph(self.onnx))
