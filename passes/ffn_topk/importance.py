"""How much each block of neurons contributes to an FFN's output, and how many important blocks a prediction finds."""

from __future__ import annotations

import numpy as np

from trimtab.passes.sampled_ffn import SampledFFN


def norms(layer: SampledFFN) -> np.ndarray:
    """‖v_j‖ of each neuron's row of W_down, [d_ff]: what one unit of its activation adds to the output."""
    row_norms: np.ndarray = np.linalg.norm(layer.down, axis=1)
    return row_norms


def importance(h: np.ndarray, norm: np.ndarray, block: int) -> np.ndarray:
    """Σ |h_j| ‖v_j‖ over the neurons of each block, [tokens, blocks], of activations h [tokens, d_ff]."""
    return pool(np.abs(h) * norm, block)


def pool(scores: np.ndarray, block: int) -> np.ndarray:
    """Sums over neighbouring neurons, [tokens, d_ff / block]."""
    return scores if block == 1 else scores.reshape(len(scores), -1, block).sum(-1)


def places(scores: np.ndarray, truth: np.ndarray, k: int, shards: int = 1) -> np.ndarray:
    """Rank of each of the k most important blocks in the predicted order, from 1, [tokens, k].

    To compute a block, each shard has to take as many blocks as its rank. Blocks that contribute nothing have rank 0.

    Args:
        scores: predicted importance, [tokens, blocks].
        truth: true importance, [tokens, blocks].
        shards: neighbouring parts of the blocks. Ranks count within a part.
    """
    wanted = most_important(truth, k)
    order = np.argsort(-scores.reshape(len(scores) * shards, -1), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    needed = np.take_along_axis(rank.reshape(scores.shape), wanted, axis=1) + 1
    return np.where(np.take_along_axis(truth, wanted, axis=1) > 0, needed, 0)


def most_important(truth: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k most important blocks of each token, [tokens, k]."""
    blocks: np.ndarray = np.argpartition(-truth, k - 1, axis=1)[:, :k]
    return blocks


def best_of_shards(scores: np.ndarray, local: int, shards: int = 1) -> np.ndarray:
    """Which blocks are among the `local` blocks of highest score in their shard, bool [tokens, blocks].

    Args:
        shards: neighbouring parts of the blocks.
    """
    parts = scores.reshape(len(scores) * shards, -1)
    chosen = np.zeros(parts.shape, bool)
    np.put_along_axis(chosen, most_important(parts, local), True, axis=1)
    return chosen.reshape(scores.shape)


def smallest(ranks: np.ndarray, recall: float) -> int:
    """The smallest number of blocks to take so that the share `recall` of all wanted blocks is computed."""
    ordered = np.sort(ranks, axis=None)
    return int(ordered[max(int(np.ceil(recall * ordered.size)), 1) - 1])


def recall_at(ranks: np.ndarray, taken: int) -> float:
    """Share of the wanted blocks that are computed if `taken` blocks are."""
    return float((ranks <= taken).mean())
