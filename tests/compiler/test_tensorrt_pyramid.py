"""Encoders of packed tokens on TensorRT: what its builder gets, run by ONNX Runtime, and real builds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from packed_encoder import exit_weights
from rewrite import canonical, session

from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.compiler.targets.tensorrt.prepare import prepare
from trimtab.compiler.workload import Workload
from trimtab.passes import PassContext, run_passes
from trimtab.passes.contract import Pass
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.graph import save_graph
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.token_prune import TokenPrune
from trimtab.passes.unpad import Unpad

SIZES = Workload(batch=(2, 4, 8), tokens=(1, 12, 24))
LAYERS, WIDTH, CLASSES = 3, 48, 3
"""Of the zoo's bert."""
EXITS = (0, 1)


class Model:
    """A tiny encoder of packed tokens with random exits, as a build has it."""

    def __init__(
        self, folder: Path, *, prune: bool = True, exits: bool = True, kind: str = "light", exporter: str = "dynamo"
    ) -> None:
        seed = int(np.random.default_rng().integers(1 << 30))
        print(f"seed {seed}")
        self.rng = np.random.default_rng(seed)
        learned: dict[str, np.ndarray] = {}
        for number in EXITS:
            learned |= exit_weights(self.rng, number, kind, WIDTH, CLASSES)
        tensors = {f"learned.magic-pyramid.{name}": weights for name, weights in learned.items()}
        profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1), tensors)
        passes: list[Pass] = [Unpad()]
        passes += [TokenPrune(keep=(1, 0.8, 0.7))] if prune else []
        passes += [EarlyExit()] if exits else []
        graph = canonical(zoo.exported("bert", exporter))
        results = run_passes(graph, passes, PassContext(profile))
        assert all(result.changed for result in results)
        self.path = folder / "model.onnx"
        save_graph(graph, self.path)
        self.session = session(self.path)

    def feeds(self, batch: int, tokens: int, threshold: float | np.ndarray) -> dict[str, np.ndarray]:
        feeds = zoo.feeds("bert", batch, tokens, self.rng)
        if batch:
            feeds["attention_mask"][0] = 1
        feeds |= {"prune": self.rng.uniform(0, 1, batch), "exit_threshold": np.full(batch, threshold)}
        wanted = {tensor.name: tensor.type for tensor in self.session.get_inputs()}
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {name: feeds[name].astype(kinds[kind]) for name, kind in wanted.items()}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, feeds), strict=True))


@pytest.mark.parametrize("kind", ["light", "first"])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_one_engine_gets_the_whole_graph_in_standard_ops(tmp_path: Path, kind: str, exporter: str) -> None:
    model = Model(tmp_path, kind=kind, exporter=exporter)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    prepared = prepare(model.path, SIZES, scratch, plugins=False, segments=1)
    (path,) = prepared.models
    proto = onnx.load(path)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"} and not proto.functions
    lowered = session(path)
    for batch, tokens in ((1, 1), (5, 7), (8, 24)):
        feeds = model.feeds(batch, tokens, model.rng.choice([0.0, 0.5, 0.9, 1.0], batch))
        wanted = model.run(feeds)
        found = dict(zip(wanted, lowered.run(list(wanted), feeds), strict=True))
        assert found["exit_layer"].tolist() == wanted["exit_layer"].tolist()
        np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exits", [False, True])
def test_one_engine_is_built(tmp_path: Path, exits: bool) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = Model(tmp_path, exits=exits)
    get_target("tensorrt-rtx").build(model.path, SIZES, tmp_path / "engine")
    info = EngineInfo.read(tmp_path / "engine")
    assert info.outputs == (("logits", "exit_layer") if exits else ("logits",)) and info.lowered == {"NonZero": 1}
    (engine,) = info.engines
    assert {tensor.name for tensor in engine.inputs} == {tensor.name for tensor in model.session.get_inputs()}
