"""Infinite constants: masks of foreign files compile, and weights with NaN or infinity are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper

from trimtab.compiler import load
from trimtab.compiler.checks.finite import check_finite
from trimtab.compiler.pipeline import compile_model
from trimtab.passes.errors import ModelError

WIDTH, ROWS, TOKENS = 16, 40, 512
INF = np.inf

_ATTENTION = """
<ir_version: 9, opset_import: ["": 18]>
causal (int64[batch, tokens] input_ids) => (float[batch, tokens, 16] last_hidden_state)
<int64[1] one = {1}, int64[1] two = {2}, int64[2] zeros = {0, 0}, int64[2] axes = {0, 1}> {
  x = Gather(table, input_ids)
  turned = Transpose<perm = [0, 2, 1]>(x)
  scores = MatMul(x, turned)
  n = Shape<start = 1, end = 2>(input_ids)
  size = Concat<axis = 0>(n, n)
  part = Slice(mask, zeros, size, axes)
  masked = MASK
  p = Softmax<axis = -1>(masked)
  last_hidden_state = MatMul(p, x)
}
"""


@pytest.mark.parametrize("form", ["Where(part, fill, scores)", "Add(scores, part)"])
def test_masks_of_minus_infinity_compile(form: str, tmp_path: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 0.5, (ROWS, WIDTH)).astype(np.float32)
    future = ~np.tri(TOKENS, dtype=bool)
    held = {"table": table, "mask": future, "fill": np.float32(-INF)}
    if form.startswith("Add"):
        held = {"table": table, "mask": np.where(future, np.float32(-INF), np.float32(0))}
    proto = onnx.parser.parse_model(_ATTENTION.replace("MASK", form))
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in held.items())
    onnx.save(proto, tmp_path / "m.onnx")
    engine = load(compile_model(tmp_path / "m.onnx", {"passes": ["canonicalize"]}, tmp_path / "build").path)
    ids = rng.integers(0, ROWS, (2, 7))
    x = table.astype(np.float64)[ids]
    weight = np.exp(x @ x.swapaxes(1, 2)) * np.tri(7)
    wanted = weight / weight.sum(-1, keepdims=True) @ x
    np.testing.assert_allclose(engine.run({"input_ids": ids})["last_hidden_state"], wanted, atol=1e-5)


@pytest.mark.parametrize("values", [-INF, INF, [-INF], [[0, -INF], [-0.0, 0]], np.full((2, 3), -INF)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_constants_that_may_be_infinite(values: object, dtype: type) -> None:
    check_finite([gs.Constant("mask", np.array(values, dtype))], hint="")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.nan, "1 of its values"), ([0, np.nan, -INF], "2 of its values are NaN or infinite, first at [1]"),
        ([[0.5, -INF]], "first at [0, 1]"), ([0, INF], "first at [1]"), ([INF], "first at [0]"),
    ],
)  # fmt: skip
def test_constants_that_are_refused(values: object, says: str) -> None:
    with pytest.raises(ModelError) as error:
        check_finite([gs.Constant("weight", np.array(values, np.float32))], hint="")
    assert says in error.value.message
