"""Layers: the residual stream in and out of each is what the model itself hands from layer to layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical, profile_of
from seeds import seeded
from streams import run, streams
from written import HEADS, NORM, PLAIN, PROJECTIONS, anatomy_of, tower

from trimtab.passes import PassContext, pass_class, run_passes
from trimtab.passes.anatomy import Anatomy, Block, find_anatomy

MIDDLE = {"bert": "attention.output", "roberta": "attention.output", "distilbert": "sa_layer_norm"}
"""Module whose output is the stream between attention and FFN, in post-norm models."""
NEXT = {
    "vit": "layernorm_after", "gpt2": "ln_2", "opt": "final_layer_norm", "llama": "post_attention_layernorm",
    "qwen2": "post_attention_layernorm", "gemma": "post_attention_layernorm", "t5": "layer.1.layer_norm",
}  # fmt: skip
"""Module whose input it is, in pre-norm models."""
EXPORTED = [(family, exporter) for family in zoo.FAMILIES for exporter in ("dynamo", "torchscript")]


@pytest.mark.parametrize(("family", "exporter"), EXPORTED)
def test_streams_are_the_models_own(family: str, exporter: str, tmp_path: Path) -> None:
    graph = canonical(zoo.exported(family, exporter))
    anatomy = find_anatomy(graph)
    feeds = zoo.feeds(family, 2, 9, seeded())
    want = streams(zoo.tiny_model(family), feeds, NEXT.get(family), MIDDLE.get(family))
    assert len(anatomy.blocks) == len(want)
    real = feeds["attention_mask"] == 1 if "attention_mask" in feeds else ...
    for block, (x, middle, y) in zip(anatomy.blocks, want, strict=True):
        assert (block.middle is None) == (middle is None) == (family == "gpt_neox")
        tensors = [block.x, block.y] + ([block.middle] if block.middle is not None else [])
        values = run(graph, tensors, feeds, tmp_path)
        for got, wanted in zip(values, [x, y, middle], strict=False):
            assert wanted is not None
            np.testing.assert_allclose(got.reshape(x.shape)[real], wanted.reshape(x.shape).numpy()[real], atol=2e-5)


@pytest.mark.parametrize(
    ("family", "exporter"),
    [*EXPORTED, *((family, "cached") for family in zoo.DECODERS), ("llama", "genai")],
)
def test_parts_are_those_of_their_layer(family: str, exporter: str) -> None:
    anatomy = find_anatomy(canonical(zoo.exported(family, exporter)))
    assert [block.layer for block in anatomy.blocks] == list(range(anatomy.layers))
    assert [block.attention for block in anatomy.blocks] == list(anatomy.attentions)
    assert [block.ffn for block in anatomy.blocks] == list(anatomy.ffns)
    for block, after in zip(anatomy.blocks, anatomy.blocks[1:], strict=False):
        assert block.y is after.x
    norms = [id(node) for block in anatomy.blocks for node in block.norms]
    assert len(norms) == len(set(norms)) == 2 * anatomy.layers
    assert set(norms) <= {id(node) for node in anatomy.norms}


@pytest.mark.parametrize(("family", "exporter"), EXPORTED)
def test_probabilities_are_rows_that_sum_to_one(family: str, exporter: str, tmp_path: Path) -> None:
    """[batch, heads, queries, keys] or [batch · heads, queries, keys], and nothing for keys that are padding."""
    graph = canonical(zoo.exported(family, exporter))
    attentions = find_anatomy(graph).attentions
    feeds = zoo.feeds(family, 3, 7, seeded())
    tensors = [a.probabilities for a in attentions if a.probabilities is not None]
    assert len(tensors) == len(attentions)
    mask = feeds.get("attention_mask")
    for attention, values in zip(attentions, run(graph, tensors, feeds, tmp_path), strict=True):
        tokens = values.shape[-1]
        weights = values.reshape(3, attention.heads, tokens, tokens)
        real = np.ones((3, tokens), bool) if mask is None else mask == 1
        np.testing.assert_allclose(weights.transpose(0, 2, 1, 3)[real].sum(-1), 1, atol=1e-5)
        on_padding = real[:, None, :, None] & ~real[:, None, None, :]
        assert weights[np.broadcast_to(on_padding, weights.shape)].max(initial=0) < 1e-6


def test_fused_attentions_show_no_probabilities() -> None:
    for exporter in ("dynamo", "cached"):
        anatomy = find_anatomy(canonical(zoo.exported("gpt2", exporter)))
        assert [a.probabilities is None for a in anatomy.attentions] == [exporter == "cached"] * 2


ATTEND = PROJECTIONS + HEADS + PLAIN


def blocks_of(body: str) -> tuple[Anatomy, list[tuple[str, str | None, str]]]:
    anatomy = anatomy_of(body)
    names = [(b.x.name, b.middle.name if b.middle is not None else None, b.y.name) for b in anatomy.blocks]
    return anatomy, names


@pytest.mark.parametrize(
    ("body", "want"),
    [
        # pre-norm; the last norm is none of the layer's
        (NORM + ATTEND + "e = MatMul (r, o) m = Add (e, x) n2 = LayerNormalization (m, g) u = MatMul (n2, up) "
         "h = Relu (u) d = MatMul (h, down) z = Add (m, d) y = LayerNormalization (z, g)", ("x", "m", "z")),
        # norms on the branches' outputs (OLMo 2), so that the last sum looks like that of a post-norm model
        (ATTEND.replace("(n,", "(x,") + "e = MatMul (r, o) en = RMSNormalization (e, g) m = Add (x, en) "
         "u = MatMul (m, up) h = Relu (u) d = MatMul (h, down) dn = RMSNormalization (d, g) z = Add (dn, m) "
         "y = RMSNormalization (z, g)", ("x", "m", "z")),
        # post-norm, the norms written out
        (ATTEND.replace("(n,", "(x,") + "e = MatMul (r, o) t = Add (x, e) sm = ReduceMean (t, last) "
         "sc = Sub (t, sm) sq = Pow (sc, two) sv = ReduceMean (sq, last) se = Add (sv, eps) sr = Sqrt (se) "
         "sd = Div (sc, sr) m = Mul (sd, g) u = MatMul (m, up) h = Relu (u) d = MatMul (h, down) z = Add (m, d) "
         "y = LayerNormalization (z, g)", ("x", "m", "y")),
        # a mean taken off before an RMS norm (Cohere)
        ("xm = ReduceMean (x, last) xc = Sub (x, xm) n = RMSNormalization (xc, g) " + ATTEND + "e = MatMul (r, o) "
         "t = Add (x, e) u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) y = Add (t, d)", ("x", None, "y")),
        # post-norm, the sum reshaped before its norm (OPT-350m)
        (ATTEND.replace("(n,", "(x,") + "e = MatMul (r, o) t = Add (x, e) m = LayerNormalization (t, g) "
         "u = MatMul (m, up) h = Relu (u) d = MatMul (h, down) z = Add (m, d) zr = Reshape (z, rows) "
         "y = LayerNormalization (zr, g)", ("x", "m", "y")),
        # parallel, each branch added by itself
        (NORM + ATTEND + "e = MatMul (r, o) t = Add (x, e) u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) "
         "y = Add (d, t)", ("x", None, "y")),
        # parallel, the branches added to each other first
        (NORM + ATTEND + "e = MatMul (r, o) u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) t = Add (d, e) "
         "y = Add (t, x)", ("x", None, "y")),
        # a scaled stream, and a scaled branch
        (NORM + ATTEND + "e = MatMul (r, o) ef = Mul (e, half) xt = Mul (x, two) m = Add (xt, ef) "
         "n2 = LayerNormalization (m, g) u = MatMul (n2, up) h = Relu (u) d = MatMul (h, down) y = Add (m, d)",
         ("x", "m", "y")),
        # skip norms that hand on their sum
        (NORM + ATTEND + "e = MatMul (r, o) n2, , , m = com.microsoft.SkipLayerNormalization (e, x, g) "
         "u = MatMul (n2, up) h = Relu (u) d = MatMul (h, down) y, , , z = com.microsoft.SkipLayerNormalization "
         "(d, m, g) rest = Relu (z)", ("x", "m", "z")),
        # skip norms of a post-norm model
        (ATTEND.replace("(n,", "(x,") + "e = MatMul (r, o) m = com.microsoft.SkipLayerNormalization (e, x, g) "
         "u = MatMul (m, up) h = Relu (u) d = MatMul (h, down) y = com.microsoft.SkipLayerNormalization (d, m, g)",
         ("x", "m", "y")),
        # an FFN that is not recognised: experts, or what a pass made of it
        (NORM + ATTEND + "e = MatMul (r, o) m = Add (e, x) n2 = LayerNormalization (m, g) u = MatMul (n2, up) "
         "h = Softmax (u) d = MatMul (h, down) y = Add (m, d)", ("x", "m", "y")),
    ],
)  # fmt: skip
def test_forms_of_a_layer(body: str, want: tuple[str, str | None, str]) -> None:
    anatomy, names = blocks_of(body)
    assert names == [want]
    norms = [id(node) for node in anatomy.blocks[0].norms]
    assert len(norms) == len(set(norms))


def test_an_ffn_alone_is_a_layer() -> None:
    anatomy, names = blocks_of(
        NORM + "u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) z = Add (x, d) "
        "u2 = MatMul (z, up) h2 = Relu (u2) d2 = MatMul (h2, down) y = Add (z, d2)"
    )
    assert names == [("x", None, "z"), ("z", None, "y")]
    assert [block.attention for block in anatomy.blocks] == [None, None]


def test_an_attention_that_joins_no_stream_is_no_layer() -> None:
    anatomy, names = blocks_of(NORM + ATTEND + "y = MatMul (r, o)")
    assert len(anatomy.attentions) == 1
    assert names == []


@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox", "t5"])
@pytest.mark.parametrize(
    "steps",
    [
        [("ffn-split", {"heavy": 0.4, "rank": 8})],
        [("ffn-topk", {"density": 0.2, "take": 0.4, "rank": 8})],
        [("ffn-split", {"heavy": 0.4, "rest_form": "drop"}), ("weight-only", {"bits": 4, "block": 16})],
        [("static-int8", {})],
        [("precision", {"type": "float16"})],
    ],
    ids=str,
)
def test_layers_stay_where_passes_rewrite_their_ffns(family: str, steps: list[tuple[str, dict[str, object]]]) -> None:
    graph = canonical(zoo.exported(family))
    before = [(b.x.name, b.y.name) for b in find_anatomy(graph).blocks]
    passes = [pass_class(name).model_validate(options) for name, options in steps]
    run_passes(graph, passes, PassContext(profile_of(graph)))
    after = find_anatomy(graph).blocks
    assert [(b.x.name, b.y.name) for b in after] == before
    assert all(b.attention is not None for b in after)


def test_blocks_hold_the_nodes_of_their_branches() -> None:
    anatomy = find_anatomy(canonical(zoo.exported("bert")))
    for block in anatomy.blocks:
        inside = {id(n) for part in (block.attention, block.ffn) for linear in part.linears for n in linear.nodes}
        assert inside <= block.nodes
    first, second = (block.nodes for block in anatomy.blocks[:2])
    assert not first & second


def test_deep_models_take_linear_time() -> None:
    """Nodes looked at per layer, in a stream of many layers, do not grow."""
    from trimtab.passes.anatomy import stream

    looked: list[int] = []
    for layers in (40, 160):
        count = 0
        reads = stream.reads

        def counted(node: gs.Node, reads: Any = reads) -> Any:
            nonlocal count
            count += 1
            return reads(node)

        stream.reads = counted
        try:
            blocks = find_anatomy(tower(layers)).blocks
        finally:
            stream.reads = reads
        assert len(blocks) == layers
        assert all(isinstance(block, Block) for block in blocks)
        looked.append(count)
    assert looked[1] <= 4.2 * looked[0]
