"""What each block of neurons contributes to an FFN's output, and how many of the most important a prediction finds."""

from __future__ import annotations

import numpy as np

from trimtab.passes.sampled_ffn import SampledFFN


def norms(layer: SampledFFN) -> np.ndarray:
    """‖v_j‖ of each neuron's row of W_down, [d_ff]: what one unit of its activation adds to the output."""
    found: np.ndarray = np.linalg.norm(layer.down, axis=1)
    return found


def importance(h: np.ndarray, norm: np.ndarray, block: int) -> np.ndarray:
    """Σ |h_j| ‖v_j‖ over the neurons of each block, [tokens, blocks], of activations h [tokens, d_ff]."""
    return pool(np.abs(h) * norm, block)


def pool(scores: np.ndarray, block: int) -> np.ndarray:
    """Sums over neighbouring neurons, [tokens, d_ff / block]."""
    return scores if block == 1 else scores.reshape(len(scores), -1, block).sum(-1)


def places(scores: np.ndarray, truth: np.ndarray, k: int, shards: int = 1) -> np.ndarray:
    """How many blocks have to be taken until each of the k most important ones is among them, [tokens, k].

    Those that contribute nothing need not be found: 0.

    Args:
        scores: predicted, [tokens, blocks].
        truth: importance, [tokens, blocks].
        shards: neighbouring parts of the blocks, of which each takes as many, the best of its own.
    """
    wanted = most_important(truth, k)
    order = np.argsort(-scores.reshape(len(scores) * shards, -1), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    found = np.take_along_axis(rank.reshape(scores.shape), wanted, axis=1) + 1
    return np.where(np.take_along_axis(truth, wanted, axis=1) > 0, found, 0)


def most_important(truth: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k most important blocks of each token, [tokens, k]."""
    found: np.ndarray = np.argpartition(-truth, k - 1, axis=1)[:, :k]
    return found


def best_of_shards(scores: np.ndarray, local: int, shards: int = 1) -> np.ndarray:
    """Which blocks are among the `local` of highest score of their shard, bool [tokens, blocks].

    Args:
        shards: neighbouring parts of the blocks.
    """
    parts = scores.reshape(len(scores) * shards, -1)
    found = np.zeros(parts.shape, bool)
    np.put_along_axis(found, most_important(parts, local), True, axis=1)
    return found.reshape(scores.shape)


def smallest(found_at: np.ndarray, recall: float) -> int:
    """The least number of blocks to take so that the share `recall` of all wanted ones is among them."""
    ordered = np.sort(found_at, axis=None)
    return int(ordered[max(int(np.ceil(recall * ordered.size)), 1) - 1])


def recall_at(found_at: np.ndarray, taken: int) -> float:
    """Share of the wanted blocks among the `taken` ones."""
    return float((found_at <= taken).mean())
