"""Constraints of a graph on its inputs, beyond types and shapes.

A Triton repository contains a copy of this module, so it imports only numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """A mask [batch, past + tokens] of which attention reads only the sum, so each row's tokens must come first.

    Attributes:
        mask: name of the mask's input.
        past: name of the input [batch, heads, past, width] with the cached keys, or None without a cache.
        tokens: names of the integer inputs from which the keys of each attention that reads the mask are computed.
    """

    mask: str
    past: str | None
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class Positions:
    """The maximum length of a text.

    Attributes:
        most: the maximum number of tokens of a row, including a decoder's past.
        padding: whether padding takes positions, too, and so counts.
    """

    most: int
    padding: bool

    def longest(self, feeds: Mapping[str, np.ndarray]) -> int:
        """The number of tokens of the longest row in `feeds`, counted as for `most`; 0 without `input_ids`."""
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
