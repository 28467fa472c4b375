"""SelectBlocks: the highest scores, however they are shared, sharded or let through."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.plugins import SELECT_BLOCKS, add_node
from trimtab.plugins.select_blocks import local_k


def model(**attributes: int) -> onnx.ModelProto:
    graph = graph_of(scores=(np.float32, ["batch", "tokens", "blocks"]))
    return finish(graph, add_node(graph, SELECT_BLOCKS, {"scores": graph.inputs[0]}, "blocks", **attributes))


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Of equal ones the first; in ascending order."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def check(found: dict[str, list[np.ndarray]], wanted: np.ndarray) -> None:
    for (blocks,) in found.values():
        assert blocks.dtype == np.int32
        np.testing.assert_array_equal(blocks, wanted)


@pytest.mark.parametrize("distinct", [3, 1000])
def test_each_token_takes_its_own(distinct: int) -> None:
    """With few distinct scores most are ties."""
    rng = seeded()
    scores = rng.integers(0, distinct, (2, 3, 40)).astype(np.float32)
    k = int(rng.integers(1, 41))
    check(everywhere(model(k=k), {"scores": scores}), np.stack([highest(row, k) for row in scores.reshape(6, 40)]))


@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "of either sign and zero", "infinite"])
def test_of_many_as_of_few(kind: str) -> None:
    """From 4096 on, those are looked at closely that share the first bits of the least one that is taken."""
    rng = seeded()
    count = int(rng.integers(4096, 60000))
    scores = rng.standard_normal((2, 1, count)).astype(np.float32)
    if kind == "few values":
        scores = np.round(scores)
    elif kind == "one value":
        scores[:] = -1.5
    elif kind == "of either sign and zero":
        scores = rng.choice(np.array([0.0, -0.0, 1e-42, -1e-42, 3.0], np.float32), scores.shape)
    elif kind == "infinite":
        scores[rng.random(scores.shape) < 0.1] = np.inf
        scores[rng.random(scores.shape) < 0.5] = -np.inf
    for k in (1, int(rng.integers(2, 300)), int(rng.integers(300, count)), count):
        (found,) = native(model(k=k)).run(None, {"scores": scores})
        np.testing.assert_array_equal(found, np.stack([highest(row, k) for row in scores.reshape(2, count)]))


@pytest.mark.parametrize("count", [50, 5000])
def test_no_number_is_the_least(count: int) -> None:
    rng = seeded()
    scores = rng.standard_normal((1, 1, count)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.5] = np.nan
    for k in (1, count // 4, count - 1):
        (found,) = native(model(k=k)).run(None, {"scores": scores})
        np.testing.assert_array_equal(found[0], highest(np.where(np.isnan(scores), -np.inf, scores)[0, 0], k))


def test_shared_takes_what_any_token_wants_most() -> None:
    rng = seeded()
    scores = rng.standard_normal((2, 3, 40)).astype(np.float32)
    check(everywhere(model(k=7, shared=1), {"scores": scores}), highest(scores.max((0, 1)), 7)[None])


def handed_on(row: np.ndarray, k: int, shards: int) -> np.ndarray:
    """The scores that shards hand on, each the best ⌈k / shards⌉ of its part; -inf in the places of the others."""
    parts = row.reshape(shards, -1)
    each = local_k(k, shards, len(row))
    kept = np.full_like(parts, -np.inf)
    for part, best in zip(parts, kept, strict=True):
        best[highest(part, each)] = part[highest(part, each)]
    return kept.reshape(-1)


@pytest.mark.parametrize("k", [4, 10, 47])
def test_shards_narrow_down_first(k: int) -> None:
    rng = seeded()
    scores = rng.standard_normal((1, 5, 48)).astype(np.float32)
    wanted = [highest(handed_on(row, k, 4), k) for row in scores[0]]
    check(everywhere(model(k=k, shards=4), {"scores": scores}), np.stack(wanted))


@pytest.mark.parametrize(("tokens", "taken"), [(1, 5), (4, 5), (5, 24)])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_prompt_takes_all(tokens: int, taken: int, shards: int, shared: int) -> None:
    scores = seeded().standard_normal((1, tokens, 24)).astype(np.float32)
    for (blocks,) in everywhere(model(k=5, dense_above=4, shards=shards, shared=shared), {"scores": scores}).values():
        assert blocks.shape == (1 if shared or taken == 24 else tokens, taken)
        if taken == 24:
            np.testing.assert_array_equal(blocks[0], np.arange(24))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("dense_above", [-1, 0])
def test_no_tokens(shape: tuple[int, int], dense_above: int) -> None:
    """Nobody has a choice; what is shared is still one, of the first."""
    scores = np.zeros((*shape, 24), np.float32)
    for shards in (1, 3):
        own = everywhere(model(k=5, shards=shards, dense_above=dense_above), {"scores": scores})
        check(own, np.zeros((0, 5)))
    check(everywhere(model(k=5, shared=1, dense_above=dense_above), {"scores": scores}), np.arange(5)[None])


@pytest.mark.parametrize(
    ("attributes", "says"),
    [({"k": 25}, "more than there are"), ({"k": 4, "shards": 5}, "does not divide"), ({"k": 0}, "at least 1")],
)
def test_refuses_what_does_not_fit(attributes: dict[str, int], says: str) -> None:
    with pytest.raises(Exception, match=says):
        native(model(**attributes)).run(None, {"scores": np.zeros((1, 1, 24), np.float32)})


def reached(scores: np.ndarray, k: int) -> np.ndarray:
    """The best k, of those the ones not below 0 and always the first of the best, and -1 behind them."""
    best = highest(scores, k)
    taken = best[(scores[best] >= 0) | (best == np.argmax(scores))]
    return np.concatenate([taken, np.full(k - len(taken), -1)])


@pytest.mark.parametrize("level", [-9.0, -1.0, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_at_most_takes_what_reaches_zero(tokens: int, shared: int, level: float) -> None:
    """From none that does, where the best stays, to all of them, where the first k stay."""
    rng = seeded()
    scores = (rng.integers(-20, 20, (1, tokens, 33)) / 10 + level).astype(np.float32)
    k = int(rng.integers(1, 34))
    rows = scores[0] if not shared else scores[0].max(0, keepdims=True, initial=-np.inf)
    wanted = np.array([reached(row, k) for row in rows]).reshape(-1, k)
    check(everywhere(model(k=k, shared=shared, at_most=1), {"scores": scores}), wanted)


def test_at_most_in_shards_and_in_large_calls() -> None:
    rng = seeded()
    scores = rng.standard_normal((1, 5, 48)).astype(np.float32)
    sharded = model(k=10, shards=4, at_most=1, dense_above=5)
    check(everywhere(sharded, {"scores": scores}), np.array([reached(handed_on(row, 10, 4), 10) for row in scores[0]]))
    check(everywhere(model(k=10, at_most=1, dense_above=4), {"scores": scores}), np.arange(48)[None])
