"""Meters: each accumulates, over all runs of a calibration, one part of the Profile that passes ask for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN, Anatomy, Attention
from trimtab.passes.errors import ModelError
from trimtab.passes.graph.linear import Linear
from trimtab.passes.needs import AttentionReceived, FFNStates, HeadStates, Need
from trimtab.passes.profile import FFNStats, Profile, Received

_CHUNK = 256  # rows that are widened to float64 at a time


class Meter(ABC):
    """Running statistics, whose size does not depend on the number of tokens.

    Attributes:
        tensors: tensors of the graph whose values `add` reads.
    """

    tensors: tuple[gs.Tensor, ...]

    def token_bytes(self, tokens: int) -> int:
        """Bytes of the values for one token, in a sample of `tokens` tokens."""
        return 0

    @abstractmethod
    def add(self, values: Mapping[str, np.ndarray], mask: np.ndarray | None) -> int:
        """Add the values of one run; returns the number of tokens counted.

        Args:
            values: tensor name → values.
            mask: [batch, tokens], 0 for padding; None if nothing is padded.

        Raises:
            ModelError: a value is not finite.
        """

    @abstractmethod
    def store(self, profile: Profile) -> None:
        """Put the statistics into `profile`."""


def meters_for(needs: Collection[Need], anatomy: Anatomy, origin: str, states: int, seed: int) -> list[Meter]:
    """The meters that measure `needs`.

    Args:
        origin: name of the model in messages.
        states: number of rows in a sample.
        seed: random seed of the samples; the samples of all meters are of the same tokens.

    Raises:
        ModelError: the model has no part that `needs` measures.
    """
    meters: list[Meter] = []
    if FFNStates() in needs:
        if not anatomy.ffns:
            raise ModelError(f"{origin}: no FFN found in it", hint="`trimtab inspect` lists what was not recognised")
        meters += [FFNMeter(ffn, states, seed) for ffn in anatomy.ffns]
    head = anatomy.head.vocabulary if anatomy.head is not None else None
    if HeadStates() in needs and head is not None:
        meters.append(HeadMeter(head, states, seed))
    if AttentionReceived() in needs:
        visible = [a for a in anatomy.attentions if a.probabilities is not None]
        if not visible:
            fused = sorted({a.fused for a in anatomy.attentions if a.fused})
            why = f": {', '.join(fused)} computes it inside" if fused else ""
            raise ModelError(
                f"{origin}: no attention whose probabilities are a tensor was found in it{why}",
                hint="export the model with attention written out (attn_implementation='eager')",
            )
        meters += [AttentionMeter(attention, states, seed) for attention in visible]
    return meters


class Reservoir:
    """A uniform random sample of all rows seen (Vitter 1985, algorithm R), many rows at a time.

    Reservoirs of the same size and seed keep rows at the same positions, whatever the batches are.
    """

    def __init__(self, size: int, width: int, seed: int) -> None:
        self._rows = np.empty((size, width), np.float32)
        self._random = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows: np.ndarray) -> None:
        """Offer rows [n, width]."""
        size = len(self._rows)
        positions = np.arange(self.seen, self.seen + len(rows))
        slots = (self._random.random(len(rows)) * (positions + 1)).astype(np.int64)
        slots = np.where(positions < size, positions, slots)
        taken = slots < size
        self._rows[slots[taken]] = rows[taken]  # numpy keeps the last of several rows for one slot, as algorithm R does
        self.seen += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """[min(seen, size), width], float32."""
        return self._rows[: self.seen]


class FFNMeter(Meter):
    """Sums of the activations of one FFN, and a sample of its inputs."""

    def __init__(self, ffn: FFN, states: int, seed: int) -> None:
        self.number, self.where = ffn.layer, ffn.where
        self.tensors = (ffn.x, ffn.hidden)
        self.x, self.hidden = ffn.x.name, ffn.hidden.name
        self._token_bytes = 4 * (ffn.d_model + ffn.d_ff)
        self.sums = np.zeros((3, ffn.d_ff))  # of |h|, h, h²
        self.reservoir = Reservoir(states, ffn.d_model, seed)

    def token_bytes(self, tokens: int) -> int:
        return self._token_bytes

    def add(self, values: Mapping[str, np.ndarray], mask: np.ndarray | None) -> int:
        x, hidden = _rows(values[self.x], mask), _rows(values[self.hidden], mask)
        with np.errstate(invalid="ignore"):  # what is not finite is reported below
            for start in range(0, len(hidden), _CHUNK):
                h = hidden[start : start + _CHUNK].astype(np.float64)
                self.sums += np.abs(h).sum(0), h.sum(0), np.einsum("tj,tj->j", h, h)
        _check_finite(self.where, self.sums, x)
        self.reservoir.add(x)
        return len(x)

    def store(self, profile: Profile) -> None:
        abs_sum, total, square_sum = self.sums
        stats = FFNStats(self.reservoir.seen, abs_sum, total, square_sum, self.reservoir.rows)
        profile.set_ffn(self.number, stats)


class HeadMeter(Meter):
    """A sample of the inputs of the vocabulary head."""

    def __init__(self, head: Linear, states: int, seed: int) -> None:
        self.tensors = (head.x,)
        self.x = head.x.name
        self.reservoir = Reservoir(states, head.in_features, seed)

    def add(self, values: Mapping[str, np.ndarray], mask: np.ndarray | None) -> int:
        rows = _rows(values[self.x], mask)
        _check_finite("head", rows)
        self.reservoir.add(rows)
        return len(rows)

    def store(self, profile: Profile) -> None:
        profile.set_head(self.reservoir.rows)


class AttentionMeter(Meter):
    """A sample of the attention that tokens receive in one layer, with the length of the text and the position."""

    def __init__(self, attention: Attention, states: int, seed: int) -> None:
        assert attention.probabilities is not None
        self.tensors = (attention.probabilities,)
        self.number, self.heads = attention.layer, attention.heads or 1
        self.name = attention.probabilities.name
        self.reservoir = Reservoir(states, 3, seed)

    def token_bytes(self, tokens: int) -> int:
        return 4 * self.heads * tokens

    def add(self, values: Mapping[str, np.ndarray], mask: np.ndarray | None) -> int:
        weights = values[self.name]
        queries, keys = weights.shape[-2:]
        if weights.ndim == 3:  # [batch · heads, queries, keys]
            weights = weights.reshape(-1, self.heads, queries, keys)
        batch = len(weights)
        real = np.ones((batch, keys), bool)
        if mask is not None and mask.shape == real.shape == (batch, queries):
            real = mask != 0
        lengths = real.sum(1)
        rows = real if queries == keys else np.ones((batch, queries), bool)
        from_real = np.where(rows[:, None, :, None], weights, 0).astype(np.float32)  # rows of padding are arbitrary
        received = from_real.sum((1, 2)) / (weights.shape[1] * np.maximum(rows.sum(1), 1))[:, None]
        positions = np.cumsum(real, 1) - 1
        samples = np.stack([received, np.broadcast_to(lengths[:, None], real.shape), positions], -1)[real]
        _check_finite(f"layer {self.number} attention", samples)
        self.reservoir.add(samples)
        return len(samples)

    def store(self, profile: Profile) -> None:
        values, lengths, positions = self.reservoir.rows.T
        profile.set_received(self.number, Received(values, lengths.astype(np.int32), positions.astype(np.int32)))


def _check_finite(where: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ModelError(
            f"{where}: its activations hold NaN or Inf on this data",
            hint="check the model's weights; a float16 model may overflow: export it in float32",
        )


def _rows(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """[batch, tokens, d] or [batch·tokens, d] → the rows of real tokens; after pooling, all rows."""
    keep = mask.reshape(-1) != 0 if mask is not None and mask.ndim == 2 else None
    flat = array.reshape(-1, array.shape[-1])
    return flat[keep] if keep is not None and len(keep) == len(flat) else flat
