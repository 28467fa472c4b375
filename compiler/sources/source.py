"""The common form of all kinds of models: an ONNX file, and facts about the model."""

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
"""Version of the algorithm of `model_fingerprint`. Results of older versions in the cache are not used."""


class ModelHashes(NamedTuple):
    """Hashes that identify a model.

    Attributes:
        graph: blake3 of the ONNX file, without its external data.
        weights: `model_fingerprint`, which covers every byte of the weights.
    """

    graph: str
    weights: str


@dataclass(frozen=True)
class Source:
    """A model to compile.

    Attributes:
        origin: the path that the user gave, or the name of a torch module.
        onnx: the ONNX file, the user's own or an exported one in the cache. It must not be changed.
        tokenizer: folder with the tokenizer, or None.
        labels: names of the classes, in the order of the logits, or None.
        max_tokens: maximum tokens of a text, or None if unknown.
        kind: format of the original model.
        head: meaning of the logits, as far as the model's files state it.
    """

    origin: str
    onnx: Path
    tokenizer: Path | None
    labels: tuple[str, ...] | None
    max_tokens: int | None
    kind: Literal["huggingface", "gguf", "torch", "onnx"]
    head: Head = UNKNOWN

    def graph(self) -> gs.Graph:
        """Load a new canonical graph. Its weights stay on disk until something reads them."""
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
        """`model_fingerprint` of the ONNX file. A Profile stores it to identify its model."""
        return weights_hash(self.onnx)

    @property
    def hashes(self) -> ModelHashes:
        """Hashes of the current files."""
        return ModelHashes(file_hash(self.onnx), self.fingerprint)

    @property
    def tokenizer_hashes(self) -> dict[str, str]:
        """Hashes of everything that decides the tokens of a text: tokenizer files, preparation and token limit."""
        folder = self.tokenizer
        if folder is None:
            return {}
        files = {name: file_hash(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
        return files | {"texts": str(read_preparation(folder)), "limit": str(self.max_tokens)}


def weights_hash(onnx: Path) -> str:
    """`model_fingerprint` of an ONNX file. Files that are unchanged since the last call are not read again."""

    def read() -> tuple[list[Path], Callable[[], str]]:
        graph = load_graph(onnx)
        return external_files(graph), lambda: model_fingerprint(graph)

    return remembered(_FINGERPRINT, onnx, read)
