"""The split computes the dense FFN at its exact ends, and what it promises in between, on every family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import zoo
from rewrite import canonical, profile_of, run_part, session

from trimtab.passes import Capability, PassContext, PassResult, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.ffn_split import FFNSplit
from trimtab.passes.graph import save_graph, stored_bytes
from trimtab.passes.sampled_ffn import SampledFFN

EVERYTHING = Capability(weight_bits=frozenset({2, 4, 8}))


def split(graph: gs.Graph, capability: Capability = EVERYTHING, **options: object) -> PassResult:
    context = PassContext(profile_of(graph), capability)
    return run_passes(graph, [FFNSplit.model_validate(options)], context)[0]


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    run = session(path)
    return run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})


FAMILIES = [(family, "dynamo") for family in zoo.FAMILIES] + [("bert", "torchscript"), ("llama", "torchscript")]


@pytest.mark.parametrize(("family", "exporter"), FAMILIES)
@pytest.mark.parametrize(
    "options",
    [{"heavy": 1.0}, {"heavy": 0.4, "rest_form": "fp32", "multiple": 4}, {"heavy": 0.0, "rest_form": "fp32"}],
    ids=["all heavy", "split alone", "none heavy"],
)
def test_exact_end_equals_dense(family: str, exporter: str, options: dict[str, object], tmp_path: Path) -> None:
    path = zoo.exported(family, exporter)
    graph = canonical(path)
    result = split(graph, **options)
    save_graph(graph, tmp_path / "split.onnx")
    assert result.changed == len(find_anatomy(canonical(path)).ffns) > 0
    rng = np.random.default_rng(hash((family, str(options))) % 2**32)
    for batch, tokens in ((1, 1), (1, 9), (3, 17)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        for dense, ours in zip(outputs(path, feeds), outputs(tmp_path / "split.onnx", feeds), strict=True):
            np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=2e-4 * np.abs(dense).max())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [
        {"heavy": 0.5, "rest_form": "affine", "rank": 8},
        {"heavy": 0.5, "rest_form": "affine", "rank": 8, "refit": False},
        {"heavy": 0.5, "rest_form": "drop"},
        {"heavy": 0.5, "rest_form": "low-rank", "rank": 8},
        {"heavy": 0.0, "rest_form": "affine", "rank": 8},
        {"heavy": 0.5, "heavy_form": "fp16", "rest_form": "affine", "rank": 8},
        {"heavy": 0.0, "rest_form": "drop"},
        {"heavy": 0.5, "heavy_form": "int8", "rest_form": "int4", "block": 16},
        {"heavy": 1.0, "heavy_form": "int4", "block": 16},
        {"heavy": 0.5, "heavy_form": "int4", "rest_form": "affine", "rank": 8, "block": 16},
        {"heavy": 0.5, "heavy_form": "fp16", "rest_form": "int2", "block": 16},
    ],
    ids=str,
)
def test_graph_computes_what_the_fit_says(family: str, options: dict[str, object], tmp_path: Path) -> None:
    """The error in the report, measured in numpy on held-out states, is what the emitted nodes really have."""
    path = zoo.exported(family)
    graph = canonical(path)
    profile = profile_of(graph)
    before = find_anatomy(graph).ffns
    dense = {f.layer: (f.x.name, f.y.name) for f in before}
    x = {f.layer: profile.ffn(f.layer, f.d_ff, f.d_model).states[4::5] for f in before}
    gain = {f.layer: SampledFFN(f, profile.ffn(f.layer, f.d_ff, f.d_model)).yardstick for f in before}
    want = {layer: run_part(canonical(path), *names, x[layer][None], tmp_path)[0] for layer, names in dense.items()}
    context = PassContext(profile, EVERYTHING)
    result = run_passes(graph, [FFNSplit.model_validate({"multiple": 16, **options})], context)[0]
    assert result.changed == len(before)
    for row in result.details["layers"]:
        layer = row["layer"]
        out = last_of(graph, layer)
        got = run_part(graph, dense[layer][0], out, x[layer][None], tmp_path)[0]
        centred = (want[layer] - want[layer].mean(0)) * gain[layer]
        error = np.square((got - want[layer]) * gain[layer]).sum() / np.square(centred).sum()
        assert error == pytest.approx(row["error"], rel=0.02, abs=1e-5)
        stored = sum(stored_bytes(c) for c in constants_of(graph, layer))
        assert stored == pytest.approx(row["bytes"], rel=0.02, abs=4)


@pytest.mark.parametrize("family", ["bert", "opt", "gpt2", "llama", "t5"])
def test_the_map_takes_no_product_of_its_own(family: str) -> None:
    def products(graph: gs.Graph) -> int:
        return sum(node.op in ("MatMul", "Gemm") for node in graph.nodes)

    graph = canonical(zoo.exported(family))
    before = products(graph)
    rows = split(graph, heavy=0.25, rank=4, multiple=4).details["layers"]
    assert {row["rest_form"] for row in rows} == {"affine"}
    assert products(graph) == before


def test_neurons_that_are_all_silent_split_into_finite_weights() -> None:
    graph = canonical(zoo.exported("opt"))
    for ffn in find_anatomy(graph).ffns:
        assert ffn.up.bias is not None
        ffn.up.bias.values = np.full(ffn.up.bias.shape, -1e4, np.float32)  # ReLU gives nothing
    split(graph, heavy=0.5, rank=4, multiple=4)
    made = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and t.name.startswith("ffn-split/")]
    assert made and all(np.all(np.isfinite(tensor.values)) for tensor in made)


def constants_of(graph: gs.Graph, layer: int) -> list[gs.Constant]:
    held = {t.name: t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    return [tensor for name, tensor in held.items() if name.startswith(f"ffn-split/layer.{layer}/")]


def last_of(graph: gs.Graph, layer: int) -> str:
    """The output of the split: the one tensor of its nodes that another node reads."""
    prefix = f"ffn-split/layer.{layer}/"
    ours = [node for node in graph.nodes if node.name.startswith(prefix)]
    ends = [n.outputs[0] for n in ours if any(not c.name.startswith(prefix) for c in n.outputs[0].outputs)]
    assert len(ends) == 1
    return ends[0].name


def test_refit_and_residual_score_lower_the_error() -> None:
    errors = {}
    for name, options in {
        "best": {}, "as is": {"refit": False}, "dropped": {"rest_form": "drop"},
    }.items():  # fmt: skip
        graph = canonical(zoo.exported("bert"))
        rows = split(graph, heavy=0.25, rank=8, multiple=4, **options).details["layers"]
        errors[name] = np.mean([row["error"] for row in rows])
    assert errors["best"] < errors["as is"] < errors["dropped"]


def test_share_of_heavy_neurons_is_kept() -> None:
    graph = canonical(zoo.exported("bert"))
    rows = split(graph, heavy=0.3, multiple=8).details["layers"]
    assert {row["heavy"] for row in rows} == {24}  # 0.3 · 80


@pytest.mark.parametrize(
    ("budget", "cost"), [({"size": 0.2}, "bytes"), ({"time": 0.4}, "macs"), ({"size": 0.05}, "bytes")], ids=str
)
def test_budget_is_kept_and_used(budget: dict[str, float], cost: str) -> None:
    graph = canonical(zoo.exported("bert"))
    ffns = find_anatomy(graph).ffns
    dense = sum(4 * f.params if cost == "bytes" else 2 * f.d_model * f.d_ff for f in ffns)
    result = split(graph, budget=budget, block=16, multiple=4)
    spent = sum(row[cost] for row in result.details["layers"]) / dense
    (limit,) = budget.values()
    assert 0.7 * limit < spent <= limit


def test_what_a_budget_chose_holds_on_another_machine() -> None:
    step = FFNSplit.model_validate({"budget": {"size": 0.2}, "block": 16, "multiple": 4})
    graph = canonical(zoo.exported("bert"))
    first = PassContext(profile_of(graph), EVERYTHING)
    found = run_passes(graph, [step], first)[0]
    (choice,) = first.choices.values()
    assert [plan["heavy"] for *_, plan in choice] == [row["heavy"] for row in found.details["layers"]]
    choice[1][3] |= {"heavy": 12, "heavy_form": "int8", "rest_form": "affine", "rank": 16}  # a tie went otherwise

    def heavy(capability: Capability, **options: object) -> int:
        graph = canonical(zoo.exported("bert"))
        profile = profile_of(graph)
        profile.info.choices.update(json.loads(json.dumps(first.choices)))
        context = PassContext(profile, capability)
        return int(run_passes(graph, [step.model_copy(update=options)], context)[0].details["layers"][1]["heavy"])

    assert heavy(EVERYTHING) == 12
    assert heavy(Capability(weight_bits=frozenset({8}))) != 12  # what it chose among is not there
    assert heavy(EVERYTHING, block=32) != 12
    choice[1][3]["heavy"] = 1000
    assert heavy(EVERYTHING) <= 80  # the profile is damaged


def test_error_budget_is_kept() -> None:
    loose, tight = (
        split(canonical(zoo.exported("bert")), budget={"error": e}, block=16, multiple=4).details for e in (0.3, 0.02)
    )
    assert (
        np.mean([row["error"] for row in tight["layers"]]) <= 0.03
    )  # estimates round plainly, the build with feedback
    assert loose["ffn_bytes"] < tight["ffn_bytes"]


def test_only_named_layers_change() -> None:
    graph = canonical(zoo.exported("bert"))
    result = split(graph, layers=(1,))
    assert result.changed == 1
    touched = {node.name.split("/")[1] for node in graph.nodes if node.name.startswith("ffn-split/")}
    assert touched == {"layer.1"}


@pytest.mark.parametrize(
    ("options", "capability", "message"),
    [
        ({"rest_form": "int2"}, Capability(weight_bits=frozenset({4, 8})), "does not multiply with int2"),
        ({"layers": (7,)}, EVERYTHING, "no FFN 7; it has 3"),
        ({"budget": {"size": 1e-4}}, EVERYTHING, "the least that can be reached is"),
    ],
)
def test_impossible_options_say_why(options: dict[str, object], capability: Capability, message: str) -> None:
    with pytest.raises(PassError, match=message):
        split(canonical(zoo.exported("bert")), capability, **options)


def test_profile_of_other_sizes_is_refused() -> None:
    bert = canonical(zoo.exported("bert"))
    context = PassContext(profile_of(canonical(zoo.exported("opt"))), EVERYTHING)
    with pytest.raises(
        PassError, match="layer 0 FFN: profile has 92 neurons, model has 80; calibrate this model again"
    ):
        run_passes(bert, [FFNSplit()], context)


def test_budget_names_one_goal() -> None:
    with pytest.raises(ValueError, match="one of size, time and error"):
        FFNSplit.model_validate({"budget": {"size": 0.1, "time": 0.2}})


OLD = """
<ir_version: 8, opset_import: ["": 17]>
old (float[n, 32] x) => (float[n, 32] y)
<float[32, 64] up, float[64, 32] down>
{
    h = MatMul(x, up)
    a = Relu(h)
    d = MatMul(a, down)
    y = Add(x, d)
}
"""


def test_integer_weights_raise_the_opset() -> None:
    proto = onnx.parser.parse_model(OLD)
    rng = np.random.default_rng(3)
    del proto.graph.initializer[:]
    for name, shape in (("up", (32, 64)), ("down", (64, 32))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name))
    graph = gs.import_onnx(proto)
    split(graph, heavy=1.0, heavy_form="int8", block=32)
    model = gs.export_onnx(graph)
    assert model.opset_import[0].version >= 21
    onnx.checker.check_model(model)
    x = rng.standard_normal((5, 32)).astype(np.float32)
    dense = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    ours = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(ours, dense, atol=0.02 * np.abs(dense).max())
    assert {n.op for n in graph.nodes} >= {"DequantizeLinear"}


@pytest.mark.parametrize("first", ["dynamic-int8", "ffn-split", "static-int8"])
def test_says_when_earlier_passes_have_left_it_nothing(first: str) -> None:
    graph = canonical(zoo.exported("bert"))
    steps = [pass_class(first).model_validate({}), FFNSplit()]
    before, result = run_passes(graph, steps, PassContext(profile_of(graph), EVERYTHING))
    assert before.changed and not result.changed
    assert [left.why for left in result.left] == [
        f"it recognises nothing to change behind {first}; if it should, put it in front"
    ]
