"""Gate and up packed into one product are a gated FFN to every pass, and one product again where none touches them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import packed
import pytest
from rewrite import canonical, profile_of, session
from seeds import seeded
from streams import run, streams
from written import NORM, D, F, graph_of

from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import read_data
from trimtab.compiler.sources import open_source
from trimtab.passes import PassContext, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.canonicalize.repack import repack
from trimtab.passes.graph import is_external, load_graph, save_graph, stored_bytes, values
from trimtab.passes.graph.weights import Part
from trimtab.passes.shard import divide


def answers(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    runner = session(path)
    found: np.ndarray = runner.run(None, {i.name: feeds[i.name] for i in runner.get_inputs()})[0]
    return found


def products(graph: gs.Graph) -> int:
    return Counter(node.op for node in graph.nodes)["MatMul"]


@pytest.mark.parametrize(("family", "exporter"), packed.EXPORTS)
def test_parts_and_streams(family: str, exporter: str, tmp_path: Path) -> None:
    graph = canonical(packed.exported(family, exporter))
    anatomy = find_anatomy(graph)
    assert anatomy.unrecognized == ()
    assert len(anatomy.ffns) == len(anatomy.blocks) == packed.LAYERS
    activation = "gelu" if family == "modernbert" else "silu"
    for block in anatomy.blocks:
        ffn, attention = block.ffn, block.attention
        assert ffn is not None and attention is not None
        assert (ffn.gated, ffn.activation.name, ffn.d_model, ffn.d_ff) == (
            True,
            activation,
            packed.WIDTH,
            packed.NEURONS,
        )
        assert (attention.heads, attention.kv_heads, attention.head_dim) == (4, 4 if family == "modernbert" else 2, 12)
        assert (attention.q is attention.k is attention.v) == (family != "glm")
    feeds = packed.feeds(2, 9, seeded())
    before = "mlp_norm" if family == "modernbert" else "post_attention_layernorm"
    want = streams(packed.tiny_model(family), feeds, before=before)
    real = feeds["attention_mask"] == 1
    tensors = [t for block in anatomy.blocks for t in (block.x, block.middle, block.y) if t is not None]
    for got, wanted in zip(run(graph, tensors, feeds, tmp_path), [t for three in want for t in three], strict=True):
        assert wanted is not None
        np.testing.assert_allclose(got[real], wanted.numpy()[real], atol=2e-5)


PASSES = [
    [("ffn-split", {"heavy": 1.0})],
    [("ffn-split", {"heavy": 0.4, "rest_form": "fp32", "multiple": 4})],
    [("ffn-topk", {"density": 1.0, "take": None, "rank": 8})],
    [("weight-only", {"bits": 8, "block": 16})],
    [("static-int8", {})],
    [("dynamic-int8", {})],
]
NEAR = {"weight-only": 0.05, "static-int8": 0.3, "dynamic-int8": 0.3}  # of the largest; the others have an exact end


@pytest.mark.parametrize("family", packed.FAMILIES)
@pytest.mark.parametrize("steps", PASSES, ids=str)
def test_every_ffn_pass_takes_them(family: str, steps: list[tuple[str, dict[str, object]]], tmp_path: Path) -> None:
    path = packed.exported(family)
    graph = canonical(path)
    profile = profile_of(graph)
    (result,) = run_passes(graph, [pass_class(n).model_validate(o) for n, o in steps], PassContext(profile))
    assert result.changed >= packed.LAYERS
    assert not any("FFN" in left.where for left in result.left)
    save_graph(graph, tmp_path / "model.onnx")
    feeds = packed.feeds(3, 11, seeded())
    want = answers(path, feeds)
    near = NEAR.get(result.name, 2e-4) * np.abs(want).max()
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", feeds), want, rtol=1e-4, atol=near)


def test_they_divide_among_ranks() -> None:
    graph = canonical(packed.exported("phi3"))
    for rank in (divide(graph, number, 2) for number in range(2)):
        assert [row["place"] for row in rank.result.details["places"]][:2] == ["layer 0 FFN", "layer 1 FFN"]
        matrices = [t for t in rank.graph.tensors().values() if isinstance(t, gs.Constant) and len(t.shape) == 2]
        assert sum(list(t.shape) == [packed.WIDTH, packed.NEURONS // 2] for t in matrices) == 2 * packed.LAYERS


def test_they_are_calibrated(tmp_path: Path) -> None:
    """The sums of |h| are those of the torch model's own h."""
    import torch

    rng = seeded()
    feeds = packed.feeds(6, 9, rng)
    np.savez(tmp_path / "data.npz", **feeds)
    profile = calibrate(open_source(str(packed.exported("modernbert"))), read_data(tmp_path / "data.npz"))
    hidden: list[torch.Tensor] = []
    model = packed.tiny_model("modernbert")
    hooks = [
        layer.mlp.Wo.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    for hook in hooks:
        hook.remove()
    real = torch.from_numpy(feeds["attention_mask"] == 1)
    for layer, h in enumerate(hidden):
        stats = profile.ffn(layer, packed.NEURONS, packed.WIDTH)
        np.testing.assert_allclose(stats.abs_sum, h[real].abs().sum(0).numpy(), rtol=1e-3)


@pytest.mark.parametrize(("family", "exporter"), packed.EXPORTS)
def test_untouched_halves_become_one_product_again(family: str, exporter: str, tmp_path: Path) -> None:
    save_graph(load_graph(packed.exported(family, exporter)), tmp_path / "model.onnx")
    dense = load_graph(tmp_path / "model.onnx")
    graph = canonical(tmp_path / "model.onnx")
    assert products(graph) == products(dense) + packed.LAYERS
    halves = [linear.weight for ffn in find_anatomy(graph).ffns for linear in ffn.linears[:2]]
    assert all(isinstance(half._values, Part) for half in halves)  # nothing was read
    assert sum(stored_bytes(half) for half in halves) == 4 * 2 * packed.LAYERS * packed.WIDTH * packed.NEURONS
    assert repack(graph) == packed.LAYERS
    assert products(graph) == products(dense)
    weights = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and len(t.shape) == 2]
    assert all(is_external(t) for t in weights if list(t.shape) == [packed.WIDTH, 2 * packed.NEURONS])
    save_graph(graph, tmp_path / "again.onnx")
    feeds = packed.feeds(2, 7, seeded())
    want = answers(packed.exported(family, exporter), feeds)
    np.testing.assert_allclose(answers(tmp_path / "again.onnx", feeds), want, rtol=1e-5, atol=1e-5)


def test_what_a_pass_has_touched_stays_two_products() -> None:
    graph = canonical(packed.exported("phi3"))
    gate = find_anatomy(graph).ffns[0].linears[0].weight
    gate.values = values(gate) * np.float32(2)
    assert repack(graph) == packed.LAYERS - 1


def test_layers_that_share_a_weight_share_its_halves(tmp_path: Path) -> None:
    body = "w = MatMul (n, wide) a, u = Split <axis = -1, num_outputs = 2> (w) s = Sigmoid (a) h = Mul (s, u) "
    second = (
        "w2 = MatMul (z, wide) a2, u2 = Split <axis = -1, num_outputs = 2> (w2) s2 = Sigmoid (a2) h2 = Mul (u2, s2) "
    )
    graph = graph_of(
        NORM + body + "d = MatMul (h, down) z = Add (x, d) " + second + "d2 = MatMul (h2, down) y = Add (z, d2)"
    )
    first, last = find_anatomy(graph).ffns
    assert [a.weight is b.weight for a, b in zip(first.linears, last.linears, strict=True)] == [True] * 3
    assert repack(graph) == 2
    assert sum(isinstance(t, gs.Constant) and list(t.shape) == [D, 2 * F] for t in graph.tensors().values()) == 1


HIDDEN = "s = Sigmoid (a) h = Mul (s, u) d = MatMul (h, down) y = Add (x, d)"
WIDE = "w = MatMul (n, wide) "
FORMS = {
    "split": WIDE + "a, u = Split <axis = 2, num_outputs = 2> (w) " + HIDDEN,
    "split, negative axis, sizes": WIDE + "a, u = Split <axis = -1> (w, ff) " + HIDDEN,
    "up first": WIDE + "u, a = Split <axis = -1, num_outputs = 2> (w) " + HIDDEN,
    "slices": WIDE + "a = Slice (w, f0, f1, last) u = Slice (w, f1, f2, last) " + HIDDEN,
    "slices, up first": WIDE + "u = Slice (w, f0, f1, last) a = Slice (w, f1, f2, last) " + HIDDEN,
    "slices from the end": WIDE + "a = Slice (w, f0, less, last) u = Slice (w, less, most, last) " + HIDDEN,
    "computed bounds": WIDE + "t = Shape (w) e = Gather (t, last) g1 = Div (e, two_) a = Slice (w, f0, g1, last) "
    "u = Slice (w, g1, most, last) " + HIDDEN,
    "bias": WIDE + "b = Add (w, bw) a, u = Split <axis = -1, num_outputs = 2> (b) " + HIDDEN,
    "transposed": "t = Transpose <perm = [1, 0]> (tall) w = MatMul (n, t) "
    "a, u = Split <axis = -1, num_outputs = 2> (w) " + HIDDEN,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("put_back", [False, True])
def test_forms(form: str, put_back: bool, tmp_path: Path) -> None:
    graph = graph_of(NORM + FORMS[form], canonical=False)
    save_graph(graph, tmp_path / "dense.onnx")
    graph = load_graph(tmp_path / "dense.onnx")
    Canonicalize().run(graph, PassContext())
    (ffn,) = find_anatomy(graph).ffns
    assert (ffn.gated, ffn.activation.name, ffn.d_ff, ffn.up.bias is not None) == (True, "sigmoid", F, form == "bias")
    assert repack(graph) == 1 if put_back else True
    save_graph(graph, tmp_path / "model.onnx")
    x = {"x": seeded().standard_normal((2, 5, D)).astype(np.float32)}
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", x), answers(tmp_path / "dense.onnx", x), atol=1e-5)
    assert products(graph) == (2 if put_back else 3)


def test_a_gemm_of_rows(tmp_path: Path) -> None:
    """Where there are rows alone, exporters write Gemm, with its weight transposed and its bias inside."""
    body = NORM + "w = Gemm <transB = 1> (n, tall, bw) a, u = Split <axis = 1, num_outputs = 2> (w) " + HIDDEN
    graph = graph_of(body, inputs=f"float[B, {D}] x", outputs=f"float[B, {D}] y", canonical=False)
    save_graph(graph, tmp_path / "dense.onnx")
    Canonicalize().run(graph, PassContext())
    assert [ffn.gated for ffn in find_anatomy(graph).ffns] == [True]
    x = {"x": seeded().standard_normal((3, D)).astype(np.float32)}
    want = answers(tmp_path / "dense.onnx", x)
    for number in range(2):
        save_graph(graph, tmp_path / f"{number}.onnx")
        np.testing.assert_allclose(answers(tmp_path / f"{number}.onnx", x), want, atol=1e-5)
        assert repack(graph) == 1 - number


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_halves_of_half_precision(dtype: object, tmp_path: Path) -> None:
    graph = graph_of(NORM + FORMS["split"], canonical=False)
    wide = graph.tensors()["wide"]
    if dtype == "bfloat16":
        proto = onnx.helper.make_tensor(
            "wide", onnx.TensorProto.BFLOAT16, [D, 2 * F], values(wide).reshape(-1).tolist()
        )
        made = gs.Constant("narrow wide", onnx_values(proto))
    else:
        made = gs.Constant("narrow wide", values(wide).astype(np.float16))
    cast = gs.Variable("wide", np.float32)
    (reader,) = wide.outputs
    reader.inputs[1] = cast
    cast.name = "widened"
    graph.nodes.insert(0, gs.Node("Cast", "widen", {"to": 1}, [made], [cast]))
    save_graph(graph, tmp_path / "dense.onnx")
    graph = load_graph(tmp_path / "dense.onnx")
    Canonicalize().run(graph, PassContext())
    assert [ffn.gated for ffn in find_anatomy(graph).ffns] == [True]
    save_graph(graph, tmp_path / "model.onnx")
    x = {"x": seeded().standard_normal((2, 5, D)).astype(np.float32)}
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", x), answers(tmp_path / "dense.onnx", x), atol=1e-5)


def onnx_values(proto: onnx.TensorProto) -> object:
    from onnx_graphsurgeon.ir.tensor import LazyValues

    return LazyValues(proto)


@pytest.mark.parametrize(
    "body",
    [
        # a half that something else reads, too
        WIDE + "a, u = Split <axis = 2, num_outputs = 2> (w) c = Softmax (u) " + HIDDEN.replace("(s, u)", "(s, c)"),
        # halves that overlap
        WIDE + "a = Slice (w, f0, f1, last) u = Slice (w, f0, f1, last) " + HIDDEN,
        # every other feature
        WIDE + "a = Slice (w, f0, f2, last, two_) u = Slice (w, one_, f2, last, two_) " + HIDDEN,
        # no down projection of the right size behind
        WIDE + "a, u = Split <axis = 2, num_outputs = 2> (w) s = Sigmoid (a) h = Mul (s, u) y = MatMul (h, narrow)",
        # read whole, too
        WIDE
        + "a, u = Split <axis = 2, num_outputs = 2> (w) q2 = ReduceMean (w, last) s0 = Sigmoid (a) s = Mul (s0, q2) "
        "h = Mul (s, u) d = MatMul (h, down) y = Add (x, d)",
    ],
)
def test_other_products_stay(body: str) -> None:
    graph = graph_of(NORM + body)
    assert products(graph) == 2
    assert find_anatomy(graph).ffns == ()
