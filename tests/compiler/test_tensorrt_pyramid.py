"""Encoders of packed tokens on TensorRT: what its builder gets, run by ONNX Runtime, and real builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from packed_encoder import exit_weights
from positions import positional_graph
from rewrite import canonical, session
from stand_ins import stand_in

from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.tensorrt.chain import Chain
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.compiler.targets.tensorrt.prepare import prepare
from trimtab.compiler.workload import Workload
from trimtab.passes import PassContext, run_passes
from trimtab.passes.contract import Pass
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import constant, insert, load_graph, save_graph
from trimtab.passes.precision import Precision
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
        self,
        folder: Path,
        *,
        prune: bool = True,
        kind: str = "light",
        exporter: str = "dynamo",
        family: str = "bert",
        behind: Sequence[Pass] = (),
        **options: Any,
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
        passes += [TokenPrune(keep=(0.8,))] if prune else []
        passes += [EarlyExit(**options)]
        graph = canonical(zoo.exported("bert", exporter)) if family == "bert" else self._classifier(family)
        results = run_passes(graph, [*passes, *behind], PassContext(profile))
        assert all(result.changed for result in results)
        self.path = folder / "model.onnx"
        save_graph(graph, self.path)
        self.session = session(self.path)

    def _classifier(self, family: str) -> gs.Graph:
        """Of the first token of a sample, by attention with a bias by position."""
        graph = positional_graph(family)
        (states,) = graph.outputs
        first = insert(graph, "Gather", [states, constant("at", np.array(0))], "first", attrs={"axis": 1})
        weight = constant("weight", self.rng.normal(size=(WIDTH, CLASSES)).astype(np.float32))
        logits = insert(graph, "MatMul", [first, weight], "logits", dtype=np.float32)
        logits.shape, graph.outputs = ["batch", CLASSES], [logits]
        return graph

    def feeds(self, batch: int, tokens: int, threshold: float | np.ndarray) -> dict[str, np.ndarray]:
        feeds = zoo.feeds("bert", batch, tokens, self.rng)
        feeds |= {"prune": self.rng.uniform(0, 1, batch), "exit_threshold": np.full(batch, threshold)}
        wanted = {tensor.name: tensor.type for tensor in self.session.get_inputs()}
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {name: feeds[name].astype(kinds[kind]) for name, kind in wanted.items()}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [tensor.name for tensor in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, feeds), strict=True))


def unlike(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> int:
    """How many samples have other outputs: next to none, since rounding decides where a doubt lies at its threshold."""
    assert found.keys() == wanted.keys()
    same = np.ones(len(wanted["logits"]), bool)
    for name, value in wanted.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        same &= np.isclose(found[name], value, rtol=1e-4, atol=1e-4).reshape(len(value), -1).all(1)
    return int((~same).sum())


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
    lowered, odd = session(path), 0
    for batch, tokens in ((1, 1), (5, 7), (8, 24)):
        feeds = model.feeds(batch, tokens, model.rng.choice([0.0, 0.5, 0.9, 1.0], batch))
        wanted = model.run(feeds)
        found = dict(zip(wanted, lowered.run(list(wanted), feeds), strict=True))
        odd += unlike(found, wanted)
    assert odd <= 1


@pytest.mark.parametrize("prune", [False, True])
def test_attentions_are_plugins(tmp_path: Path, prune: bool) -> None:
    """Where plugins are taken: one launch, or two where tokens are pruned by what they receive."""
    pytest.importorskip("triton", reason="the kernels need the package triton")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = Model(tmp_path, prune=prune)
    (path,) = prepare(model.path, SIZES, scratch, plugins=True, segments=1).models
    attentions = [node for node in onnx.load(model.path).graph.node if node.op_type == "PackedAttention"]
    wanted: list[str] = []
    for node in attentions:
        two = ["AttentionRowsPlugin_log_sum_exp", "AttentionReceivedPlugin"]
        wanted += two if any(node.output[1:]) else ["AttentionRowsPlugin"]
    proto = onnx.load(path)
    found = [node.op_type for node in proto.graph.node if node.domain == "trimtab"]
    assert sorted(found) == sorted(wanted) and len(wanted) > LAYERS * prune and not proto.functions


def test_one_engine_is_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = Model(tmp_path)
    get_target("tensorrt-rtx").build(model.path, SIZES, tmp_path / "engine", options=EngineOptions(segments=1))
    info = EngineInfo.read(tmp_path / "engine")
    assert info.outputs == ("logits", "exit_layer") and info.lowered == {"NonZero": 1} and info.exits is None
    (engine,) = info.engines
    assert {tensor.name for tensor in engine.inputs} == {tensor.name for tensor in model.session.get_inputs()}


class Cut:
    """Stand-ins for the engines that `model` is cut into, and what is done between them."""

    def __init__(self, model: Model, folder: Path) -> None:
        folder.mkdir()
        self.prepared = prepare(model.path, SIZES, folder, plugins=False)
        self.used: list[int] = []
        assert self.prepared.exits is not None
        shapes = [profile.shapes for (profile,) in self.prepared.profiles]
        shapes[0] = {name: ((1,) * len(high), opt, high) for name, (_, opt, high) in shapes[0].items()}  # one alone too
        pairs = zip(self.prepared.models, shapes, strict=True)
        self.stages = [stand_in(path, {"all": each}, self.used) for path, each in pairs]
        hook = self.prepared.exits.hook()
        self.chain = Chain(self.stages, self.prepared.inputs, self.prepared.outputs, hook=hook)


@pytest.mark.parametrize(
    ("options", "prune"),
    [
        ({}, True),
        ({"criterion": "patience"}, False),
        ({"criterion": "probability", "after": [1]}, True),
        ({"report": False, "family": "mpnet"}, False),
    ],
)
def test_engines_up_to_each_exit_give_the_results_of_the_one_file(
    tmp_path: Path, options: dict[str, Any], prune: bool
) -> None:
    """Whoever leaves where, in whatever batch; the order is that of the samples."""
    model = Model(tmp_path, prune=prune, **options)
    cut = Cut(model, tmp_path / "cut")
    assert len(cut.stages) == len(options.get("after", EXITS)) + 1
    odd = 0
    for batch, tokens in ((1, 1), (1, 24), (2, 5), (5, 12), (8, 24), (8, 3)):
        feeds = model.feeds(batch, tokens, model.rng.uniform(0, 1, batch))
        wanted, found = model.run(feeds), cut.chain.run(feeds)
        odd += unlike(found, wanted)
    assert odd <= 1


def test_where_all_leave_no_later_engine_runs(tmp_path: Path) -> None:
    model = Model(tmp_path, prune=False)
    cut = Cut(model, tmp_path / "cut")
    for threshold, layers, engines in ((2.0, 0, 1), (0.0, LAYERS, 3)):
        cut.used.clear()
        found = cut.chain.run(model.feeds(4, 9, threshold))
        assert found["exit_layer"].tolist() == [layers] * 4 and len(cut.used) == engines


def test_engines_of_half_precision(tmp_path: Path) -> None:
    """What exits answer has the type of what the end answers."""
    model = Model(tmp_path, prune=False, behind=[Precision()])
    cut = Cut(model, tmp_path / "cut")
    assert any(tensor.type == "tensor(float16)" for tensor in cut.stages[0].session.get_outputs())
    for threshold in (0.0, 2.0):
        feeds = model.feeds(6, 12, np.where(np.arange(6) < 2, 2.0, threshold))
        wanted, found = model.run(feeds), cut.chain.run(feeds)
        assert found["exit_layer"].tolist() == wanted["exit_layer"].tolist() and found["logits"].dtype == np.float32
        np.testing.assert_allclose(found["logits"], wanted["logits"], rtol=0, atol=0.05)


def test_engines_up_to_each_exit_are_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = Model(tmp_path)
    cut = Cut(model, tmp_path / "cut")
    get_target("tensorrt-rtx").build(model.path, SIZES, tmp_path / "engine")
    info = EngineInfo.read(tmp_path / "engine")
    assert info.exits == cut.prepared.exits and info.outputs == ("logits", "exit_layer")
    for engine, stage in zip(info.engines, cut.stages, strict=True):
        assert {t.name for t in engine.inputs} == set(stage.inputs)
        assert {t.name for t in engine.outputs} == set(stage.outputs)
    for engine in info.engines[1:]:  # one sample, and none of its tokens
        (profile,) = engine.profiles
        lows = {name: low[0] for name, (low, _, _) in profile.shapes.items()}
        assert set(lows.values()) == {0, 1, 2} and all(lows[name] == 0 for name in info.exits.packed if name in lows)


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    model = Model(tmp_path)
    with pytest.raises(TargetError, match="3 engines of a model whose samples leave at 2 exits"):
        prepare(model.path, SIZES, tmp_path, plugins=False, segments=3)
    graph = load_graph(model.path)
    graph.outputs.append(next(node.outputs[0] for node in graph.nodes if node.op == "KeepSamples"))
    save_graph(graph, tmp_path / "odd.onnx")
    with pytest.raises(TargetError, match=r"cut behind its exits: .*/exit/stay: 0 ScatterND.*engine: {segments: 1}"):
        prepare(tmp_path / "odd.onnx", SIZES, tmp_path, plugins=False)
