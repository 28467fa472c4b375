"""A one-layer model and a pass made for tests, so that the compiler is tested apart from exporters and real passes."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel, ConfigDict, Field

from trimtab.passes import Left, Pass, PassContext, PassResult
from trimtab.passes.needs import FFNStates, Need

WIDTH, NEURONS, ROWS = 24, 40, 50


class Budget(BaseModel):
    """Nested options."""

    model_config = ConfigDict(extra="forbid")

    size: float | None = Field(None, gt=0, le=1)


class Dampen(Pass):
    """Multiplies the down projections by `factor`; 1 changes nothing."""

    name: ClassVar[str] = "dampen"
    summary: ClassVar[str] = "for tests"
    needs: ClassVar[frozenset[Need]] = frozenset({FFNStates()})

    factor: float = Field(1.0, ge=0, le=2)
    spare: int | None = None
    budget: Budget | None = None

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        from trimtab.passes.anatomy import find_anatomy

        assert context.profile is not None
        blocks = find_anatomy(graph).ffns
        rows = []
        for ffn in blocks:
            context.profile.ffn(ffn.layer, ffn.d_ff, ffn.d_model)
            weight = ffn.down.weight
            weight.values = (weight.values * np.float32(self.factor)).astype(np.float32)
            rows.append({"layer": ffn.layer, "factor": self.factor})
        left = (Left("layer 9 FFN", "it does not exist"),)
        return PassResult(self.name, len(blocks), left, {"layers": rows, "ffn_bytes": 123})


PASS = "tiny:Dampen"


def model(path: Path, *, seed: int = 0, ffn: bool = True, poison: float | None = None, external: bool = False) -> Path:
    """A model of ids [batch, tokens] → last_hidden_state [batch, tokens, WIDTH].

    Args:
        ffn: without, it is a table that is looked up.
        poison: put into one of the FFN's weights.
        external: store the weights beside the file instead of in it.
    """
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.3, shape).astype(np.float32), name)

    up = weight("up", WIDTH, NEURONS)
    if poison is not None:
        array = numpy_helper.to_array(up).copy()
        array[3, 7] = poison
        up = numpy_helper.from_array(array, "up")
    last = "x" if ffn else "last_hidden_state"
    nodes = [helper.make_node("Gather", ["table", "input_ids"], [last], name="look up")]
    weights = [weight("table", ROWS, WIDTH)]
    if ffn:
        nodes += [
            helper.make_node("MatMul", ["x", "up"], ["a"], name="up"),
            helper.make_node("Add", ["a", "up_bias"], ["b"], name="up bias"),
            helper.make_node("Relu", ["b"], ["c"], name="relu"),
            helper.make_node("MatMul", ["c", "down"], ["d"], name="down"),
            helper.make_node("Add", ["d", "down_bias"], ["e"], name="down bias"),
            helper.make_node("Add", ["x", "e"], ["last_hidden_state"], name="residual"),
        ]
        weights += [up, weight("up_bias", NEURONS), weight("down", NEURONS, WIDTH), weight("down_bias", WIDTH)]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    y = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    graph = helper.make_graph(nodes, "tiny", [ids], [y], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0)
    return path


def ids(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, ROWS, (batch, tokens))


def data(path: Path, samples: int = 32) -> Path:
    """Calibration data for `model`."""
    np.savez(path, input_ids=ids(samples, 12))
    return path
