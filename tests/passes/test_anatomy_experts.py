"""Mixtures of experts as one op of com.microsoft: their number is reported where the graph states it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from seeds import seeded

from trimtab.passes.anatomy.experts import find_experts

COUNT = int(seeded().integers(2, 30))
WEIGHTS = {
    "constant": gs.Constant("w", np.zeros((COUNT, 8, 4), np.float32)),
    "computed": gs.Variable("w", np.float32, [COUNT, 8, 4]),
    "symbolic": gs.Variable("w", np.float32, ["experts", 8, 4]),
    "nameless size": gs.Variable("w", np.float32, [None, 8, 4]),
    "scalar": gs.Variable("w", np.float32, []),
    "no shape": gs.Variable("w", np.float32),
}


@pytest.mark.parametrize("op", ["MoE", "QMoE"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_number_of_experts_is_known_or_left_out(kind: str, op: str) -> None:
    inputs = [gs.Variable("x", np.float32, ["B", 4]), gs.Variable("scores", np.float32, ["B", COUNT]), WEIGHTS[kind]]
    node = gs.Node(op, "moe", inputs=inputs, outputs=[gs.Variable("y", np.float32)], domain="com.microsoft")
    (experts,) = find_experts([node])
    known = kind in ("constant", "computed")
    assert experts.count == (COUNT if known else None)
    assert experts.why_left.startswith(f"a mixture of {COUNT} experts," if known else "a mixture of experts,")
    assert experts.choice is inputs[1]
