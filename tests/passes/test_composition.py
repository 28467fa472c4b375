"""unpad, token-prune and early-exit beside the passes that rewrite products: in front, behind, and between them."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import zoo
from packed_encoder import exit_weights
from rewrite import canonical, profile_of, run_part
from routes import random_routers
from seeds import seeded

from trimtab.compiler.recipe import load_recipe
from trimtab.passes import Capability, PassContext, PassResult, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import RecipeError
from trimtab.passes.ffn_split import FFNSplit
from trimtab.passes.graph import save_graph
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import sample_ffn
from trimtab.passes.settle import fuse_bias_gelu, keep_integer_products
from trimtab.passes.static_int8 import StaticInt8
from trimtab.passes.unpad import Unpad
from trimtab.plugins.library import register

SIZES = {"bert": (3, 48, 3), "roberta": (2, 40, 5)}
"""Classifier → its layers, width and classes."""

CAPABILITY = Capability(row_scales=True)
PYRAMID = ("unpad", "token-prune", "early-exit")
PARTNERS: dict[str, dict[str, Any]] = {
    "split": {"ffn-split": {}},
    "split4": {"ffn-split": {"rest_form": "int4", "block": 16}},
    "whole": {"ffn-split": {"heavy": 1.0}},
    "route": {"ffn-route": {"most": 1.0}},
    "route8": {"ffn-route": {"most": 1.0, "weights": "int8"}},
    "topk": {"ffn-topk": {"density": 0.3, "take": 0.6, "rank": 16, "dense_above": 10**6}},
    "topk8": {"ffn-topk": {"density": 0.3, "take": 0.6, "rank": 16, "weights": "int8", "dense_above": 10**6}},
    "weights8": {"weight-only": {"block": 16}},
    "weights4": {"weight-only": {"bits": 4, "block": 16}},
    "static": {"static-int8": {}},
    "tensor": {"dynamic-int8": {"scales": "tensor"}},
    "row": {"dynamic-int8": {"scales": "row"}},
    "half": {"precision": {}},
}
RECIPES = [
    *(
        " ".join([*PYRAMID[:place], partner, *PYRAMID[place:]])
        for partner in ("split", "topk", "weights8", "static")
        for place in range(4)
    ),
    *(f"unpad token-prune early-exit {partner}" for partner in ("tensor", "row", "half", "split4")),
    "split4 unpad token-prune early-exit",
    "weights4 unpad token-prune early-exit",
    "split unpad token-prune early-exit static row",
    "split unpad token-prune early-exit weights4 row",
    "topk8 unpad token-prune early-exit weights8",
    "unpad token-prune topk early-exit tensor",
]


def steps_of(recipe: str) -> list[Any]:
    return [{name: {}} if (name in PYRAMID) else PARTNERS[name] for name in recipe.split()]


@cache
def profile(family: str) -> Profile:
    """Random states of FFNs, thresholds and exits, as calibration and training would have left them."""
    rng = np.random.default_rng(5)
    layers, width, classes = SIZES[family]
    made = profile_of(canonical(zoo.exported(family)))
    learned = {"thresholds": np.array([0.02, *rng.uniform(0.05, 0.2, layers - 1)], np.float32)}
    for after in range(layers):
        learned |= exit_weights(rng, after, "light", width, classes)
    routers = random_routers(canonical(zoo.exported(family)), rng, threshold=0.45)
    made.tensors |= {f"learned.magic-pyramid.{name}": value for name, value in learned.items()}
    made.tensors |= {f"learned.lte.{name}": value for name, value in routers.items()}
    return made


class Built:
    """What a recipe makes of a tiny classifier, as ONNX Runtime runs it in a build."""

    def __init__(self, family: str, recipe: str, folder: Path) -> None:
        graph = canonical(zoo.exported(family))
        steps = [pass_class(name).model_validate(o) for step in steps_of(recipe) for name, o in step.items()]
        self.results: list[PassResult] = run_passes(graph, steps, PassContext(profile(family), CAPABILITY))
        self.kept = keep_integer_products(graph)
        fuse_bias_gelu(graph)
        path = folder / f"{recipe.replace(' ', '-')}.onnx"
        save_graph(graph, path)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
        register(options)
        self.optimized = path.with_suffix(".optimized.onnx")
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: dict[str, np.ndarray], **dials: Any) -> tuple[np.ndarray, list[int]]:
        """Logits, and the layers that each sample ran."""
        count = len(feeds["input_ids"])
        given = feeds | {name: np.full(count, value, np.float32) for name, value in dials.items()}
        logits, *layers = self.session.run(None, {i.name: given[i.name] for i in self.session.get_inputs()})
        return logits, layers[0].tolist() if layers else []


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_composition(recipe: str, tmp_path: Path) -> None:
    family, rng = "bert", seeded()
    built = Built(family, recipe, tmp_path)
    assert all(result.changed for result in built.results), built.results
    without = Built(family, " ".join(n for n in recipe.split() if n not in PYRAMID[1:]), tmp_path)
    for batch, tokens in ((0, 5), (1, 1), (3, 1), (1, 17), (5, 30)):
        feeds = zoo.feeds(family, batch, tokens, rng)
        wanted, _ = without.run(feeds)
        logits, layers = built.run(feeds, prune=0, exit_threshold=0)
        close = 2e-3 if "half" in recipe else 1e-5  # in half precision the last logits are rounded once more
        np.testing.assert_allclose(logits, wanted, rtol=close, atol=close)
        assert layers == [SIZES[family][0]] * batch
    feeds = zoo.feeds(family, 8, 15, rng)
    assert built.run(feeds, prune=1, exit_threshold=2)[1] == [0] * 8  # all leave: what follows has no rows
    if "tensor" in recipe:
        return  # one scale for all tokens of a call: company counts, with or without the pyramid
    prune, limits = rng.uniform(0, 4, 8), rng.uniform(0, 0.5, 8)
    together, layers = built.run(feeds, prune=prune, exit_threshold=limits)
    alone = [built.run(one, prune=p, exit_threshold=e) for one, p, e in zip(samples(feeds), prune, limits, strict=True)]
    exact = "row" in recipe and "weights" not in recipe
    near = [np.allclose(a[0][0], t, rtol=0, atol=1e-6 if exact else 2e-2) for a, t in zip(alone, together, strict=True)]
    # What is rounded to integers, and what is compared with a threshold, may fall to either side; that is rare.
    assert sum(near) >= 6
    assert sum(a[1] == [n] for a, n in zip(alone, layers, strict=True)) >= 6


EXACT = {"prune": 0.0, "exit_threshold": 0.0, "route_threshold": 0.0}


@pytest.mark.parametrize("int8", ["", "row"], ids=["float", "int8"])
@pytest.mark.parametrize("ffn", ["", "whole", "split", "route", "route8"])
def test_any_subset_of_the_methods(ffn: str, int8: str, tmp_path: Path) -> None:
    """Pruning, exits, FFNs that are split or routed, integers: any of them in one recipe, in its one order.

    Where all dials are exact, the build is the dense model, or its int8 form; and a sample's answer is its own.
    """
    family, rng = "bert", seeded()
    front, routes = ("", ffn) if "route" in ffn else (ffn, "")

    def built(*methods: str) -> Built:
        passes = [front, "unpad", *methods[:1], routes, *methods[1:], int8]
        return Built(family, " ".join(filter(None, passes)), tmp_path)

    dense = Built(family, " ".join(filter(None, ["unpad", int8])), tmp_path)
    alike = ffn in ("", "whole") or (ffn == "route" and not int8)  # the others have FFNs of another form
    without = dense if alike else built()
    for prune, leave in product(("", "token-prune"), ("", "early-exit")):
        one = built(prune, leave)
        assert all(result.changed for result in one.results), one.results
        for batch, tokens in ((0, 5), (1, 1), (5, 30)):
            feeds = zoo.feeds(family, batch, tokens, rng)
            wanted, logits = without.run(feeds, **EXACT)[0], one.run(feeds, **EXACT)[0]
            # an integer that falls to the other side of a half, as one of a thousand may, moves a logit by some 1e-3
            close = 1e-2 if int8 and ffn not in ("", "split") else 1e-5
            np.testing.assert_allclose(logits, wanted, rtol=close, atol=close)
            if ffn != "split" and batch:
                apart = np.abs(logits - dense.run(feeds)[0]).max()
                assert apart <= (0.05 if int8 or ffn == "route8" else 1e-5) * max(1.0, np.abs(logits).max())
        feeds = zoo.feeds(family, 8, 15, rng)
        dials = {name: rng.uniform(0, most, 8) for name, most in zip(EXACT, (4, 0.5, 1), strict=True)}
        together, layers = one.run(feeds, **dials)
        near = left = 0
        for place, sample in enumerate(samples(feeds)):
            alone, ran = one.run(sample, **{name: value[place] for name, value in dials.items()})
            near += np.allclose(alone[0], together[place], rtol=0, atol=2e-2 if routes else 1e-5)
            left += ran == layers[place : place + 1]
        assert near >= 6 and left >= 6  # what is compared with a threshold may fall to either side; that is rare


@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_what_only_chooses_is_not_rounded(scales: str, tmp_path: Path) -> None:
    """Routers and predictors stay in floating point behind dynamic-int8, and are named; all else is integers."""
    for recipe, products in ((f"unpad route {scales}", 1), (f"unpad topk {scales}", 2)):
        built = Built("bert", recipe, tmp_path)
        floats = [left.where for left in built.results[-1].left if "only chooses" in left.why]
        assert len(floats) == products * SIZES["bert"][0] == len(built.results[-1].left), built.results[-1].left
        floating = [
            n for n in onnx.load(tmp_path / f"{recipe.replace(' ', '-')}.onnx").graph.node if n.op_type == "MatMul"
        ]
        assert {node.output[0] for node in floating} >= set(floats)


def samples(feeds: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each sample of a batch alone, without padding."""
    lengths = feeds["attention_mask"].sum(1)
    return [{name: array[i : i + 1, :n] for name, array in feeds.items()} for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        (["early-exit"], "early-exit works on what unpad makes"),
        (["token-prune"], "token-prune works on what unpad makes"),
        (["token-prune", "unpad"], "token-prune works on what unpad makes"),
        (["dynamic-int8", "unpad"], "unpad cannot run behind dynamic-int8: .*products of integers"),
        (["unpad", "dynamic-int8", "token-prune"], "token-prune cannot run behind dynamic-int8"),
        (["unpad", "dynamic-int8", "early-exit"], "early-exit cannot run behind dynamic-int8"),
        (["precision", "unpad"], "unpad cannot run behind precision: .*float16"),
        (["unpad", "precision", "early-exit"], "early-exit cannot run behind precision"),
        ([{"ffn-topk": {"shared": True}}, "unpad"], "unpad cannot run behind ffn-topk: .*one choice for all tokens"),
        (["unpad", "recover"], "recover cannot run behind unpad: training does not support"),
        (["ffn-topk", "recover"], "recover cannot run behind ffn-topk: training does not know"),
        (["unpad", "early-exit", "token-prune"], "token-prune cannot run behind early-exit"),
    ],
)
def test_orders_that_are_refused_when_the_recipe_is_read(passes: list[Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason) as error:
        load_recipe({"passes": passes})
    assert "put " in str(error.value.hint)


@pytest.mark.parametrize(("name", "option"), [("early-exit", "after"), ("token-prune", "keep")])
def test_an_empty_list_is_refused(name: str, option: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}.{option}: .*at least 1 item"):
        load_recipe({"passes": ["unpad", {name: {option: []}}]})


def test_an_exit_behind_a_pruned_first_layer(tmp_path: Path) -> None:
    """Its width is that of the first layer, whose output projection reads the tokens that stay."""
    graph = canonical(zoo.exported("bert"))
    steps = [Unpad(), pass_class("token-prune")(keep=(0.5,)), pass_class("early-exit")()]
    results = run_passes(graph, steps, PassContext(profile("bert")))
    assert [result.changed for result in results] == [3, 3, 3]
    assert all(attention.out is not None for attention in find_anatomy(graph).attentions)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_ffns_keep_their_numbers_where_others_are_rewritten(family: str) -> None:
    """So each has the states of its own layer."""
    graph = canonical(zoo.exported(family))
    made = profile_of(graph)
    for name in [name for name in made.tensors if name.startswith("ffn.1.states")]:
        made.tensors[name] = made.tensors[name] * 7
    run_passes(graph, [FFNSplit(layers=(0,))], PassContext(made))
    assert [ffn.layer for ffn in find_anatomy(graph).ffns][:1] == [1]
    (result,) = run_passes(graph, [StaticInt8(layers=(1,))], PassContext(made))
    (row,) = result.details["layers"]
    wanted = np.quantile(np.abs(sample_ffn(find_anatomy(canonical(zoo.exported(family))).ffns[1], made).fit), 0.9999)
    assert row["layer"] == 1 and row["x_scale"] == pytest.approx(wanted / 127)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_static_int8_of_ffns_that_are_split(family: str, tmp_path: Path) -> None:
    """Scales are those of what the new projections read; the whole has the error of eight bits."""
    graph = canonical(zoo.exported(family))
    made = profile_of(graph)
    ffn = find_anatomy(graph).ffns[-1]
    states = sample_ffn(ffn, made).held_out[None, :40]
    x, reader = ffn.x.name, ffn.y.outputs[0]
    run_passes(graph, [FFNSplit(rank=8)], PassContext(made))
    y = next(t.name for t in reader.inputs if t.name.startswith("ffn-split"))
    want = run_part(graph, x, y, states, tmp_path)
    (result,) = run_passes(graph, [StaticInt8()], PassContext(made))
    assert result.changed == len(result.details["layers"]) == ffn.layer + 1 and not result.left
    got = run_part(graph, x, next(t.name for t in reader.inputs if "layer" in t.name and t.inputs), states, tmp_path)
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


def test_products_of_packed_tokens_stay_integers(tmp_path: Path) -> None:
    products = 2 * SIZES["bert"][0]
    for recipe in ("static unpad", "static unpad token-prune early-exit", "unpad static"):
        built = Built("bert", recipe, tmp_path)
        assert built.kept == products
        ops = [node.op_type for node in onnx.load(built.optimized).graph.node]
        assert ops.count("MatMulIntegerToFloat") == products
    assert Built("bert", "static", tmp_path).kept == 0


def test_static_int8_leaves_what_sparse_ops_compute() -> None:
    graph = canonical(zoo.exported("bert"))
    (topk,) = steps_of("topk")
    (first, result) = run_passes(
        graph, [pass_class("ffn-topk").model_validate(topk["ffn-topk"]), StaticInt8()], PassContext(profile("bert"))
    )
    assert first.changed == 3 and result.changed == 0
    assert {left.where for left in result.left} == {f"layer {n} FFN" for n in range(3)}
    assert all("SparseUp" in left.why for left in result.left)


@pytest.mark.parametrize("scales", ["tensor", "row"])
def test_bytes_of_ffns_behind_several_passes(scales: str) -> None:
    """What static-int8 and ffn-split have stored counts as FFNs' in what dynamic-int8 says, and no product twice."""
    graph = canonical(zoo.exported("bert"))
    steps = [FFNSplit(layers=(0, 1)), StaticInt8(layers=(1, 2)), pass_class("dynamic-int8")(scales=scales)]
    split, static, dynamic = run_passes(graph, steps, PassContext(profile("bert"), CAPABILITY))
    assert [split.changed, static.changed, dynamic.changed] == [2, 2, 16]
    assert dynamic.details["float_products"] == 6  # of attention, whose operands are both computed
    dense = sum(row["dense_bytes"] for row in split.details["layers"]) / 2
    assert 0.25 * 3 * dense < dynamic.details["ffn_bytes"] < 0.35 * 3 * dense
    assert not any("head" in left.where for left in (*split.left, *static.left))


def test_what_is_left_of_the_last_ffn_is_no_head() -> None:
    graph = canonical(zoo.exported("bert"))
    head = find_anatomy(graph).head
    assert head is not None
    names = [linear.y.name for linear in head.linears]
    run_passes(graph, [FFNSplit()], PassContext(profile("bert")))
    head = find_anatomy(graph).head
    assert head is not None and [linear.y.name for linear in head.linears] == names
