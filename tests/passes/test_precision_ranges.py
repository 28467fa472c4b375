"""What half precision would spoil stays in float32: positions, buckets, decisions, masks, epsilons, sums of squares."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from half import in_half, parsed
from positions import FAMILIES, long_feeds, positional_graph, positional_model
from rewrite import profile_of, session
from seeds import seeded

from trimtab.passes import Capability, PassContext, pass_class, run_passes
from trimtab.passes.graph import save_graph

TYPES = ("float16", "bfloat16")
FLOAT = np.float32


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(float) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("family", FAMILIES)
def test_as_exact_as_torch_beyond_every_bucket(tmp_path: Path, family: str) -> None:
    import torch

    rng, model = seeded(), positional_model(family)
    for kind in TYPES:
        half = copy.deepcopy(model).to(getattr(torch, kind))
        run, result = in_half(positional_graph(family), tmp_path / kind, type=kind)
        assert not result.left
        assert result.details["ops"]["MatMul"] >= 8, "what half precision is for"
        names = [value.name for value in run.get_inputs()]
        for tokens in (1, 8, 17, 40, 100, 300):
            given = long_feeds(names, 2, tokens, rng)
            torch_given = {name: torch.tensor(value) for name, value in given.items()}
            with torch.no_grad():
                want, theirs = (each(**torch_given)[0].float().numpy() for each in (model, half))
            real = given["attention_mask"].astype(bool)
            (got,) = run.run(None, given)
            ours, allowed = (distance(each[real], want[real]) for each in (got, theirs))
            assert np.isfinite(got).all() and ours <= 1.5 * allowed + 1e-3, f"{kind}, {tokens} tokens: {ours:.1e}"


@pytest.mark.parametrize(
    "passes",
    [
        {"ffn-split": {}},
        {"ffn-topk": {"density": 0.3, "take": 0.5, "recall": 0.01, "dense_above": 3}},
        {"weight-only": {"bits": 8}},
        {"ffn-split": {}, "weight-only": {"bits": 8}},
    ],
    ids=lambda p: "+".join(p),
)
def test_behind_other_passes(tmp_path: Path, passes: dict[str, Any]) -> None:
    rng, graph = seeded(), positional_graph("mpnet")
    steps = [pass_class(name).model_validate(options) for name, options in passes.items()]
    run_passes(graph, steps, PassContext(profile_of(graph)))
    save_graph(graph, tmp_path / "wide.onnx")
    wide, (half, _) = session(tmp_path / "wide.onnx"), in_half(graph, tmp_path / "half", capability=Capability())
    for tokens in (8, 40, 300):
        given = long_feeds(["input_ids", "attention_mask"], 2, tokens, rng)
        assert distance(half.run(None, given)[0], wide.run(None, given)[0]) < 1e-2


def both(graph: gs.Graph, folder: Path, given: dict[str, np.ndarray], kind: str, **options: Any) -> tuple[Any, Any]:
    """The outputs of `graph` in float32, and in half precision."""
    save_graph(graph, folder / "wide.onnx")
    half, _ = in_half(graph, folder / "half", type=kind, **options)
    return session(folder / "wide.onnx").run(None, given), half.run(None, given)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "decision",
    [
        "q = Div (f, c)  y = Floor (q)",
        "q = Div (f, c)  y = Ceil (q)",
        "q = Div (f, c)  y = Round (q)",
        "y = Mod <fmod = 1> (f, c)",
        "q = Sub (f, c)  y = Sign (q)",
        "q = Sqrt (f)  i = Cast <to = 7> (q)  y = Cast <to = 1> (i)",
        "q = Log (f)  r = Mul (q, c)  i = Cast <to = 6> (r)  y = Gather (table, i)",
        "q = Less (f, c)  y = Where (q, c, zero)",
        "q = Mul (f, f)  i = Equal (q, c)  y = Cast <to = 1> (i)",
        "i, k = TopK <largest = 0> (f, five)  y = Identity (i)",
    ],
    ids=lambda text: " ".join(word for word in text.split() if word[0].isupper()),
)
def test_decisions_by_positions_are_exact(tmp_path: Path, decision: str, kind: str) -> None:
    rng = seeded()
    graph = parsed(
        "g (int64[n] p) => (float[m] y) { f = Cast <to = 1> (p)  " + decision + " }",
        c=rng.uniform(2, 5000, ()).astype(FLOAT), zero=np.array(0, FLOAT), five=np.array([5]),
        table=np.arange(50_000, dtype=FLOAT) % 64,
    )  # fmt: skip
    (want,), (got,) = both(graph, tmp_path, {"p": np.arange(1, 5001)}, kind)
    digits = 2.0 ** -(8 if kind == "bfloat16" else 11) if "Gather" in decision or "Where" in decision else 0
    np.testing.assert_allclose(got, want, rtol=digits)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("table", [False, True], ids=["computed", "constant"])
def test_a_bias_that_grows_with_positions(tmp_path: Path, table: bool, kind: str) -> None:
    """As ALiBi's: behind a thousand tokens, half precision would give neighbours one weight."""
    rng = seeded()
    tokens, slopes = 3000, (2.0 ** -np.arange(0, 4)).astype(FLOAT)[:, None]
    bias = "b = Identity (t)" if table else "f = Cast <to = 1> (p)  b = Mul (f, slopes)"
    graph = parsed(
        "g (int64[n] p, float[4, n] x, float[n, 3] v) => (float[4, 3] y) { "
        + bias + "  s = Mul (x, scale)  a = Add (s, b)  w = Softmax (a)  y = MatMul (w, v) }",
        slopes=slopes, t=slopes * np.arange(tokens, dtype=FLOAT), scale=np.array(0.5, FLOAT),
    )  # fmt: skip
    given = {
        "p": np.arange(tokens), "x": rng.normal(size=(4, tokens)).astype(FLOAT),
        "v": rng.normal(size=(tokens, 3)).astype(FLOAT),
    }  # fmt: skip
    (want,), (got,) = both(graph, tmp_path, given, kind)
    np.testing.assert_allclose(got, want, atol=0.03 if kind == "bfloat16" else 4e-3)


MASKS = {
    "where": "o = Where (m, zero, far)  a = Add (x, o)",
    "twice": "o = Where (m, zero, far)  b = Add (x, o)  a = Add (b, o)",
    "computed": "f = Cast <to = 1> (m)  n = Sub (one, f)  o = Mul (n, far)  a = Add (x, o)",
    "subtracted": "f = Cast <to = 1> (m)  n = Sub (one, f)  o = Mul (n, near)  a = Sub (x, o)",
    "selected": "a = Where (m, x, far)",
    "given": "a = Add (x, mask)",
    "expanded": "o = Where (m, zero, far)  e = Unsqueeze (o, axis)  d = Squeeze (e, axis)  a = Add (x, d)",
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("far", [-1e4, -65504.0, -1e9, float(np.finfo(FLOAT).min)])
@pytest.mark.parametrize("form", MASKS)
def test_masked_rows_stay_finite(tmp_path: Path, form: str, far: float, kind: str) -> None:
    rng = seeded()
    graph = parsed(
        "g (float[r, n] x, bool[r, n] m, float[r, n] mask) => (float[r, n] y) { " + MASKS[form] + "  y = Softmax (a) }",
        zero=np.array(0, FLOAT), one=np.array(1, FLOAT), far=np.array(far, FLOAT), near=np.array(-far, FLOAT),
        axis=np.array([0]),
    )  # fmt: skip
    m = rng.random((6, 40)) < 0.5
    m[0], m[1] = False, True
    x = rng.normal(size=m.shape, scale=5).astype(FLOAT)
    given = {"x": x, "m": m, "mask": np.where(m, 0, far).astype(FLOAT)}
    (want,), (got,) = both(graph, tmp_path, given, kind)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.sum(1), 1, atol=0.03)
    np.testing.assert_allclose(got[1:], want[1:], atol=0.1 if kind == "bfloat16" else 1e-2)
    assert not got[1:][~m[1:]].any()


@pytest.mark.parametrize("kind", TYPES)
def test_infinity_that_was_meant_stays(tmp_path: Path, kind: str) -> None:
    """torch's safe softmax turns the NaN of a row that is masked throughout into zeros."""
    rng = seeded()
    graph = parsed(
        """g (float[r, n] x, float[r, n] mask) => (float[r, n] y) { a = Add (x, mask)  s = Softmax (a)  n = IsNaN (s)
        y = Where (n, zero, s) }""",
        zero=np.array(0, FLOAT),
    )
    mask = np.where(rng.random((6, 40)) < 0.5, 0, -np.inf).astype(FLOAT)
    mask[0] = -np.inf
    x = rng.normal(size=mask.shape).astype(FLOAT)
    (want,), (got,) = both(graph, tmp_path, {"x": x, "mask": mask}, kind)
    assert not want[0].any()
    np.testing.assert_allclose(got, want, atol=2e-2)


NORMS = {
    "rms": """q = Mul (x, x)  s = ReduceMean (q, last)  v = Add (s, epsilon)  r = Sqrt (v)  i = Reciprocal (r)
        y = Mul (x, i)""",
    "layer": """u = ReduceMean (x, last)  d = Sub (x, u)  q = Mul (d, d)  s = ReduceMean (q, last)  v = Add (s, epsilon)
        r = Sqrt (v)  y = Div (d, r)""",
    "power": "q = Pow (x, two)  s = ReduceMean (q, last)  v = Add (s, epsilon)  r = Pow (v, half)  y = Div (x, r)",
    "length": "l = ReduceL2 (x, last)  c = Max (l, epsilon)  e = Expand (c, shape)  y = Div (x, e)",
    "mean": "s = ReduceSum (x, last)  y = Div (s, count)",
    "pooled": "e = Mul (x, f)  s = ReduceSum (e, last)  t = ReduceSum (f, last)  c = Clip (t, epsilon)  y = Div (s, c)",
    "softmax": "u = ReduceMax (x, last)  d = Sub (x, u)  e = Exp (d)  s = ReduceSum (e, last)  y = Div (e, s)",
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", NORMS)
def test_quotients_of_statistics(tmp_path: Path, form: str, kind: str) -> None:
    """Zero rows, whose epsilon half precision has not; rows whose squares and sums are beyond float16."""
    rng = seeded()
    graph = parsed(
        "g (float[r, 400] x, int64[r, 400] m) => (float[a, b] y) { f = Cast <to = 1> (m)  " + NORMS[form] + " }",
        last=np.array([-1]), epsilon=np.array(1e-12, FLOAT), two=np.array(2, FLOAT), half=np.array(0.5, FLOAT),
        shape=np.array([5, 400]), count=np.array(400, FLOAT),
    )  # fmt: skip
    x = rng.normal(size=(5, 400)) * [[0], [1], [30], [1000], [5000]]
    x[4] = np.abs(x[4])
    mask = np.ones((5, 400), int)
    mask[0], mask[1, 7:] = 0, 0
    (want,), (got,) = both(graph, tmp_path, {"x": x.astype(FLOAT), "m": mask}, kind)
    largest = np.maximum(np.abs(want).max(axis=1, keepdims=True), 1e-9)
    np.testing.assert_allclose(got / largest, want / largest, atol=3e-2 if kind == "bfloat16" else 4e-3)


def test_a_clip_keeps_what_float16_holds(tmp_path: Path) -> None:
    graph = parsed(
        "g (float[n] x) => (float[n] y) { c = Clip (x, low, high)  y = Relu (c) }",
        low=np.array(np.finfo(FLOAT).min), high=np.array(np.finfo(FLOAT).max),
    )  # fmt: skip
    x = np.array([1, 33_000, 65_000], FLOAT)
    _, (got,) = both(graph, tmp_path, {"x": x}, "float16")
    np.testing.assert_allclose(got, x, rtol=1e-3)


@pytest.mark.parametrize("kind", TYPES)
def test_decisions_by_activations_are_told(tmp_path: Path, kind: str) -> None:
    """A router: its product is what half precision is for; from there to the choice it is float32, and told."""
    rng = seeded()
    graph = parsed(
        """g (float[n, 96] x) => (float[n, 2] y, int64[n, 2] i) { l = MatMul (x, w)  s = Softmax (l)
        t, i = TopK (s, two)  y = Mul (t, scale) }""",
        w=rng.normal(size=(96, 16)).astype(FLOAT), two=np.array([2]), scale=np.array(2, FLOAT),
    )  # fmt: skip
    node = next(node for node in graph.nodes if node.op == "TopK")
    node.name = "router/TopK"
    _, result = in_half(graph, tmp_path, type=kind)
    assert [(left.where, kind in left.why) for left in result.left] == [("router/TopK", True)]
    assert result.details["ops"] == {"MatMul": 1, "Mul": 1}
    assert result.details["why"] == {"decision": 2}


def test_integers_become_half_at_once(tmp_path: Path) -> None:
    graph = parsed("g (int64[n, 8] m, float[n, 8] x) => (float[n, 8] y) { f = Cast <to = 1> (m)  y = Mul (x, f) }")
    _, result = in_half(graph, tmp_path)
    casts = [node for node in graph.nodes if node.op == "Cast"]
    assert not any(maker.op == "Cast" for node in casts for maker in node.inputs[0].inputs)
    assert result.details["ops"] == {"Mul": 1}
