"""What every kind of model becomes: an ONNX file, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import onnx_graphsurgeon as gs

from trimtab.compiler.caching.remembered import file_hash, remembered
from trimtab.compiler.data.preparation import read_preparation
from trimtab.compiler.sources.folder import TOKENIZER_FILES
from trimtab.compiler.task import UNKNOWN, Head
from trimtab.passes.contract import PassContext
from trimtab.passes.errors import PassError, TrimtabError
from trimtab.passes.graph.io import external_files, load_graph, model_fingerprint

_FINGERPRINT = "fingerprint 3"
"""Names the algorithm of `model_fingerprint`: what an older one computed is not taken for it."""


class ModelHashes(NamedTuple):
    """What tells a model from another.

    Attributes:
        graph: blake3 of the ONNX file, without its external data.
        weights: `model_fingerprint`, of every byte of the weights.
    """

    graph: str
    weights: str


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
        head: what its files say of its logits.
    """

    origin: str
    onnx: Path
    tokenizer: Path | None
    labels: tuple[str, ...] | None
    max_tokens: int | None
    kind: Literal["huggingface", "gguf", "torch", "onnx"]
    head: Head = UNKNOWN

    def graph(self) -> gs.Graph:
        """A new canonical graph, whose weights stay on disk until something reads them."""
        from trimtab.passes.canonicalize import Canonicalize

        graph = load_graph(self.onnx)
        try:
            Canonicalize().run(graph, PassContext())
        except TrimtabError:
            raise
        except Exception as error:  # a fault of the pass, since the file is well-formed
            raise PassError(Canonicalize.name, [], error) from error
        return graph

    @property
    def fingerprint(self) -> str:
        """`model_fingerprint` of the ONNX file: what a Profile of this model carries."""
        return weights_hash(self.onnx)

    @property
    def hashes(self) -> ModelHashes:
        """Of the files as they are now."""
        return ModelHashes(file_hash(self.onnx), self.fingerprint)

    @property
    def tokenizer_hashes(self) -> dict[str, str]:
        """Of all that decides which tokens a text becomes: the tokenizer's files, and what comes before it."""
        folder = self.tokenizer
        if folder is None:
            return {}
        files = {name: file_hash(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
        return files | {"texts": str(read_preparation(folder)), "limit": str(self.max_tokens)}


def weights_hash(onnx: Path) -> str:
    """`model_fingerprint` of an ONNX file. Files that have not changed since the last time are not read again."""

    def read() -> tuple[list[Path], Callable[[], str]]:
        graph = load_graph(onnx)
        return external_files(graph), lambda: model_fingerprint(graph)

    return remembered(_FINGERPRINT, onnx, read)
