"""A decoder's cache of keys and values: the names of its inputs and outputs, and the other inputs of a step.

Every runtime stores the cache in its own way; the names and the feeds are those of the graph. A Triton repository
carries this module, so functions that read a model import what they need themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the inputs that hold the cache, and of the outputs that hold it with the new tokens."""

LOGITS = "logits"
"""The output of a step from which the next token is chosen, [batch, tokens, vocabulary]."""

_IN_PLACE = {"GroupQueryAttention"}
"""Ops that can append to the cache in place, with past and present in one buffer."""


def present_of(past: str) -> str:
    """The output that becomes the input `past` of the next step."""
    return PRESENT + past.removeprefix(PAST)


def pasts(inputs: Iterable[str]) -> list[str]:
    """The names in `inputs` that hold the cache."""
    return [name for name in inputs if name.startswith(PAST)]


def step_feeds(input_ids: np.ndarray, attention_mask: np.ndarray, names: Collection[str]) -> dict[str, np.ndarray]:
    """Inputs of a step besides the cache; only those among `names`, the inputs of the decoder.

    Args:
        input_ids: [batch, tokens], int64.
        attention_mask: [batch, tokens of the past and of this step], int64.
    """
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in names:
        total, tokens = attention_mask.shape[1], input_ids.shape[1]
        before = attention_mask.sum(1) - attention_mask[:, total - tokens :].sum(1)
        feeds["position_ids"] = before[:, None] + np.arange(tokens)
    return {name: value for name, value in feeds.items() if name in names}


@dataclass(frozen=True)
class Cache:
    """What a decoder's file says about its cache beyond the shapes of its inputs.

    Attributes:
        in_place: every op that reads the cache can append to it in place.
        head_dim: width of keys and values; some exporters leave only a symbol for it in the inputs.
    """

    in_place: bool
    head_dim: int | None

    @classmethod
    def of(cls, model: Path) -> Cache:
        """Read an ONNX file, without its weights."""
        import onnx

        graph = onnx.load(str(model), load_external_data=False).graph
        past = {value.name: value.type.tensor_type.shape.dim for value in graph.input if pasts([value.name])}
        readers = {node.op_type for node in graph.node if not past.keys().isdisjoint(node.input)}
        sizes = {dims[-1].dim_value for dims in past.values() if dims}
        widths = sizes if 0 not in sizes else _head_dims(model)
        return cls(readers == _IN_PLACE, widths.pop() if len(widths) == 1 else None)

    def initial_shape(self, shape: Sequence[int | str], batch: int, length: int) -> tuple[int, int, int, int] | None:
        """The shape of a cache input before the first step: `length` tokens where the cache is filled in place, else 0.

        Returns:
            None where `shape` is not [batch, heads, past, width] with known heads and width.
        """
        if len(shape) != 4:
            return None
        heads, width = shape[1], self.head_dim if isinstance(shape[3], str) else shape[3]
        if not isinstance(heads, int) or not isinstance(width, int):
            return None
        return batch, heads, length if self.in_place else 0, width


def _head_dims(model: Path) -> set[int]:
    """Widths of the heads, read from the products of attention; for inputs that have only a symbol for the width."""
    from trimtab.passes.anatomy import find_anatomy
    from trimtab.passes.graph import load_graph

    heads = (attention.head_dim for attention in find_anatomy(load_graph(model)).attentions)
    return {width for width in heads if width is not None}
