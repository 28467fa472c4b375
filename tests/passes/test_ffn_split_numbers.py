"""The arithmetic of the split: rounding, regression, rank reduction and the choice within a budget."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seeds import seeded

from trimtab.passes.errors import ModelError, RecipeError
from trimtab.passes.ffn_split.budget import Budget, Candidate, choose
from trimtab.passes.ffn_split.plan import Plan
from trimtab.passes.matrices.forms import pack
from trimtab.passes.matrices.quantize import fit_block, round_to_nearest, with_feedback
from trimtab.passes.matrices.regress import Moments, leading_directions, reduce_rank


@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_packing_is_onnx_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    q = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns)).astype(np.int8)
    kind = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4, 2: onnx.TensorProto.INT2}[bits]
    tensor = onnx.helper.make_tensor("q", kind, q.shape, pack(q, bits), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), q)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_stays_within_half_a_step(bits: int) -> None:
    w = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    found = round_to_nearest(w, bits, 32)
    step = np.repeat(found.scale, 32, 0)
    unclipped = np.abs(w) < step * (2 ** (bits - 1) - 1)
    assert np.all(np.abs(found.array - w)[unclipped] <= 0.5001 * step[unclipped])
    assert found.q.min() >= -(2 ** (bits - 1)) and found.q.max() < 2 ** (bits - 1)
    assert found.nbytes == 64 * 5 * bits // 8 + 4 * 2 * 5


def test_feedback_lowers_the_output_error() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2000, 64)) @ rng.standard_normal((64, 64))  # correlated inputs, as states are
    w = rng.standard_normal((64, 24)).astype(np.float32)
    moments = x.T @ x / len(x)
    errors = [
        np.square(x @ (q.array - w)).sum() for q in (round_to_nearest(w, 4, 32), with_feedback(w, 4, 32, moments))
    ]
    assert errors[1] < 0.7 * errors[0]


def test_feedback_equals_rounding_where_inputs_are_independent() -> None:
    w = np.random.default_rng(2).standard_normal((32, 8)).astype(np.float32)
    np.testing.assert_array_equal(with_feedback(w, 4, 32, np.eye(32)).q, round_to_nearest(w, 4, 32).q)


def test_inputs_that_are_always_zero() -> None:
    """No rounding errs; none fails either."""
    w = seeded().standard_normal((32, 8)).astype(np.float32)
    np.testing.assert_array_equal(with_feedback(w, 4, 32, np.zeros((32, 32))).q, round_to_nearest(w, 4, 32).q)


@pytest.mark.parametrize("spoil", ["indefinite", "NaN"])
def test_moments_that_no_samples_have_are_refused(spoil: str) -> None:
    rng = seeded()
    w, x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((32, 8), (100, 32), (100, 3)))
    moments = Moments.of((x,), y)
    first, second = rng.choice(32, 2, replace=False)
    moments.cov[first, second] = moments.cov[second, first] = 100 if spoil == "indefinite" else np.nan
    with pytest.raises(ModelError, match="so large or so small"):
        moments.solve()
    with pytest.raises(ModelError, match="so large or so small"):
        with_feedback(w, 4, 32, moments.cov)


def test_fit_block() -> None:
    assert [fit_block(128, n) for n in (1536, 384, 96, 48, 40, 50)] == [128, 128, 32, 16, None, None]


def test_moments_solve_least_squares() -> None:
    rng = np.random.default_rng(3)
    z, c = rng.standard_normal((500, 7)) * [1, 10, 0.1, 1, 1, 1, 0] + 5, rng.standard_normal((7, 4))
    y = z @ c + 2 + 0.01 * rng.standard_normal((500, 4))
    centred = z - z.mean(0)
    want = np.linalg.lstsq(centred, y - y.mean(0), rcond=None)[0]
    found = Moments.of((z[:, :3], z[:, 3:]), y).solve(ridge=0)
    np.testing.assert_allclose(centred @ found, centred @ want, atol=1e-4)
    assert not found[6].any()  # a feature without variance explains nothing


def test_compressed_moments_are_those_of_compressed_features() -> None:
    rng = np.random.default_rng(5)
    x, h, y, left = (rng.standard_normal(shape) for shape in ((200, 6), (200, 4), (200, 3), (6, 2)))
    want, found = Moments.of((x @ left, h), y), Moments.of((x, h), y).compressed(left)
    for name in ("z_mean", "y_mean", "cov", "cross"):
        np.testing.assert_allclose(getattr(found, name), getattr(want, name), atol=1e-5)


def test_reduced_rank_beats_any_other_map_of_that_rank() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3000, 12)) * np.linspace(3, 0.1, 12)
    full, gain = rng.standard_normal((12, 9)), rng.uniform(0.2, 3, 9)
    cov = x.T @ x / len(x)
    left, right = reduce_rank(full, leading_directions(full, cov, gain, 5), 3, gain)
    assert left.shape == (12, 3) and right.shape == (3, 9)

    def error(m: np.ndarray) -> float:
        return float(np.square(x @ (m - full) * gain).sum())

    singular = np.linalg.svd(x @ full * gain, compute_uv=False)
    assert error(left @ right) == pytest.approx(np.square(singular[3:]).sum(), rel=1e-6)  # Eckart and Young
    u, s, v = np.linalg.svd(full)
    assert error(left @ right) < error(u[:, :3] * s[:3] @ v[:3])


def _candidates(rng: np.random.Generator, layers: int, each: int) -> list[list[Candidate]]:
    plan = Plan(0, "fp32", "drop", 1, 16, True)
    return [
        [Candidate(plan, float(e), int(b), int(m)) for e, b, m in rng.integers(1, 100, (each, 3))]
        for _ in range(layers)
    ]


@given(st.integers(0, 2**31), st.sampled_from(["size", "time", "error"]))
@settings(max_examples=25, deadline=None)
def test_choice_is_the_best_there_is(seed: int, what: str) -> None:
    rng = np.random.default_rng(seed)
    layers = _candidates(rng, 3, 4)
    dense = [100, 100, 100]
    limit = {"size": 0.5, "time": 0.5, "error": 40.0}[what]

    def cost(picked: tuple[Candidate, ...]) -> tuple[float, float]:
        error = sum(c.error for c in picked)
        if what == "error":
            return error / 3, sum(c.nbytes for c in picked)
        return sum(c.nbytes if what == "size" else c.macs for c in picked) / 300, error

    best = min((goal for spent, goal in map(cost, itertools.product(*layers)) if spent <= limit), default=None)
    budget = Budget.model_validate({what: limit})
    if best is None:
        with pytest.raises(RecipeError, match="the least that can be reached"):
            choose(layers, dense, dense, budget)
        return
    picked = tuple(layer[i] for layer, i in zip(layers, choose(layers, dense, dense, budget), strict=True))
    spent, goal = cost(picked)
    assert spent <= limit + 1e-9 and goal == pytest.approx(best)
