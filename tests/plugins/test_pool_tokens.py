"""PoolTokens: kernel, reference body and ONNX's evaluator average the first tokens of each sample."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from dialects import close, everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.compiler.targets.tensorrt.target import TensorRTRTX
from trimtab.plugins import POOL_TOKENS, add_node


def model(width: int, most: int = 0, dtype: type = np.float32) -> onnx.ModelProto:
    """Nodes with one body: the mean of all tokens, and of the first `most`."""
    graph = graph_of(x=(dtype, ["rows", width]), offsets=(np.int32, ["starts"]))
    given = dict(zip(("x", "offsets"), graph.inputs, strict=True))
    made = [add_node(graph, POOL_TOKENS, given, f"pooled.{i}", most=n) for i, n in enumerate((0, most))]
    return finish(graph, *made)


def feeds_of(lengths: list[int], width: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.standard_normal((sum(lengths), width)).astype(np.float32)
    return {"x": x, "offsets": np.cumsum([0, *lengths]).astype(np.int32)}


def wanted(feeds: dict[str, np.ndarray], most: int) -> np.ndarray:
    x, offsets = feeds["x"].astype(np.float64), feeds["offsets"]
    made = [x[a:b][: most or None] for a, b in pairwise(offsets)]
    return np.array([rows.mean(0) if len(rows) else np.zeros(x.shape[1]) for rows in made]).reshape(-1, x.shape[1])


def test_random_batches() -> None:
    """Samples without tokens, of one and of many, in batches of 0 to 6."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for batch in (0, 1, 2, *rng.integers(1, 7, 6)):
        most, width = int(rng.choice([1, 2, 5, 100])), int(rng.choice([1, 3, 384]))
        feeds = feeds_of([int(n) for n in rng.choice([0, 1, 2, 9, 200], batch)], width, rng)
        for got in everywhere(model(width, most), feeds).values():
            for found, of in zip(got, (0, most), strict=True):
                close(found, wanted(feeds, of))


def test_the_first_row_is_itself() -> None:
    """Not rounded."""
    rng = seeded()
    feeds = feeds_of([3, 1, 7], 16, rng)
    for got in everywhere(model(16, 1), feeds).values():
        np.testing.assert_array_equal(got[1], feeds["x"][[0, 3, 4]])


def test_half_precision_by_its_body() -> None:
    """Summed in float, and rounded once."""
    rng = seeded()
    feeds = feeds_of([300, 0, 2], 8, rng)
    half = {**feeds, "x": feeds["x"].astype(np.float16)}
    (got, _) = onnx.reference.ReferenceEvaluator(model(8, 1, np.float16)).run(None, half)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted(half, 0), atol=1e-3)


def test_what_is_not_finite_stays_in_its_sample() -> None:
    feeds = feeds_of([2, 2, 2], 4, seeded())
    feeds["x"][2, 1] = np.nan
    whole, _ = native(model(4, 1)).run(None, feeds)
    assert np.isnan(whole[1, 1]) and np.isfinite(np.delete(whole.ravel(), 5)).all()


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 3], [0, 2], [0, 4], []])
def test_offsets_that_are_none_are_refused(offsets: list[int]) -> None:
    feeds = {"x": np.zeros((3, 4), np.float32), "offsets": np.array(offsets, np.int32)}
    with pytest.raises(Exception, match="PoolTokens: offsets"):
        native(model(4)).run(None, feeds)


def test_no_rows_below_0() -> None:
    with pytest.raises(Exception, match="most is below 0"):
        native(model(4, -1))


def test_shape() -> None:
    """A row for each sample, as wide as x."""
    assert POOL_TOKENS.shapes({"x": ["rows", 4], "offsets": [8]}, {"most": 0})["y"] == [7, 4]
    assert POOL_TOKENS.shapes({"x": ["rows", 4], "offsets": None}, {"most": 0})["y"] == [None, 4]


def test_tensorrts_parser_takes_the_body(tmp_path: Path) -> None:
    """As TensorRT-RTX has it, whose parser works without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    onnx.save(model(4), tmp_path / "model.onnx")
    assert TensorRTRTX().parse([tmp_path / "model.onnx"]) == [[]]
