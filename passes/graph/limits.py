"""What a graph demands of its inputs beyond types and shapes.

A Triton repository carries this module, so it imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """A mask [batch, past + tokens] of which attention sees the sum alone: each row's tokens have to come first.

    Attributes:
        mask: name of the graph's input.
        past: name of an input [batch, heads, past, width] with earlier keys, or None where attention has none.
        tokens: names of the integer inputs that each attention which counts the mask takes its keys from.
    """

    mask: str
    past: str | None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Positions:
    """How long a text may be.

    Attributes:
        most: tokens of a row, those of a decoder's past included.
        padding: padding has positions, too, so that it counts.
    """

    most: int
    padding: bool

    def longest(self, feeds: Mapping[str, np.ndarray]) -> int:
        """Tokens of the longest row of a model's inputs, as `most` counts them; 0 without `input_ids`."""
        ids, mask = feeds.get("input_ids"), feeds.get("attention_mask")
        if ids is None or ids.ndim != 2:
            return 0
        if mask is not None and mask.ndim == 2 and not self.padding:
            return int(mask.sum(1).max(initial=0))
        pasts = (each.shape[2] for name, each in feeds.items() if name.startswith("past") and each.ndim == 4)
        past = max(pasts, default=0)
        if mask is not None and mask.ndim == 2 and past:
            past = int(mask[:, : -ids.shape[1]].sum(1).max(initial=0))
        return ids.shape[1] + past
