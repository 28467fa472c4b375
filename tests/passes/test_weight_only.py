"""weight-only: integers for what is asked for, near the dense model, and what does not fit is left with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from rewrite import canonical, profile_of, session
from seeds import seeded

from trimtab.passes import Capability, PassContext, PassResult, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import save_graph
from trimtab.passes.matrices.quantize import round_to_nearest
from trimtab.passes.weight_only import WeightOnly

EVERYTHING = Capability(weight_bits=frozenset({4, 8}), negative_scales=True)
POSITIVE = Capability(weight_bits=frozenset({4, 8}))


def rewrite(graph: gs.Graph, capability: Capability = EVERYTHING, **options: object) -> PassResult:
    return run_passes(graph, [WeightOnly.model_validate(options)], PassContext(None, capability))[0]


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    run = session(path)
    return run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(
    ("bits", "capability", "tolerance"), [(8, EVERYTHING, 0.02), (4, EVERYTHING, 0.35), (4, POSITIVE, 0.35)]
)
def test_is_near_the_dense_model(
    family: str, bits: int, capability: Capability, tolerance: float, tmp_path: Path
) -> None:
    path = zoo.exported(family)
    graph = canonical(path)
    result = rewrite(graph, capability, bits=bits, block=16)
    assert result.changed > 0
    save_graph(graph, tmp_path / "int.onnx")
    feeds = zoo.feeds(family, 24, 11, seeded())  # of a few alone, outputs may happen to be small
    for dense, ours in zip(outputs(path, feeds), outputs(tmp_path / "int.onnx", feeds), strict=True):
        assert 0 < np.linalg.norm(ours - dense) < tolerance * np.linalg.norm(dense)
    assert result.details["bytes"] < result.details["dense_bytes"] * {8: 0.34, 4: 0.21}[bits]


def test_integers_are_those_of_the_weights(tmp_path: Path) -> None:
    graph = canonical(zoo.exported("llama"))
    before = {
        f"weight-only/layer.{a.layer}.attention.{i}": linear.w()
        for a in find_anatomy(graph).attentions
        for i, linear in enumerate(a.linears)
    }
    rewrite(graph, bits=8, parts=("attention",))
    after = {
        f"weight-only/layer.{a.layer}.attention.{i}": linear
        for a in find_anatomy(graph).attentions
        for i, linear in enumerate(a.linears)
    }
    assert before.keys() == after.keys()
    for name, dense in before.items():
        assert after[name].quantized is not None
        step = np.abs(dense).reshape(-1, 32, dense.shape[1]).max(1).repeat(32, axis=0) / 127
        assert np.all(np.abs(after[name].w() - dense) <= 1.2 * step)


@pytest.mark.parametrize("capability", [EVERYTHING, POSITIVE])
def test_the_largest_of_a_block_of_int4_is_kept_where_scales_may_be_negative(capability: Capability) -> None:
    graph = canonical(zoo.exported("llama"))
    before = [linear.w() for a in find_anatomy(graph).attentions for linear in a.linears]
    rewrite(graph, capability, bits=4, parts=("attention",))
    after = [linear for a in find_anatomy(graph).attentions for linear in a.linears]
    negative = 0
    for dense, linear in zip(before, after, strict=True):
        blocks, rounded = (w.reshape(-1, 32, dense.shape[1]) for w in (dense, linear.w()))
        top = np.abs(blocks).argmax(1)[:, None]
        largest = (np.take_along_axis(w, top, 1) for w in (rounded, blocks))
        kept = np.isclose(*largest, rtol=1.001 * 2**-8)  # which is how far off a scale in bfloat16 is
        assert kept.all() == capability.negative_scales
        scale = linear.quantized.inputs[1].values
        negative += int((scale < 0).sum())
        if capability.negative_scales:
            assert (np.abs(rounded - blocks) <= np.abs(scale)[:, None] * 1.04).all()  # +8 itself does not exist
    assert bool(negative) == capability.negative_scales


@pytest.mark.parametrize("parts", [("attention",), ("ffn",), ("head",)])
def test_only_what_is_asked_for(parts: tuple[str, ...]) -> None:
    graph = canonical(zoo.exported("llama"))
    rewrite(graph, parts=parts)
    found = find_anatomy(graph)
    quantized = {
        "attention": [linear.quantized is not None for a in found.attentions for linear in a.linears],
        "ffn": [linear.quantized is not None for f in found.ffns for linear in f.linears],
        "head": [linear.quantized is not None for linear in found.head.linears],  # type: ignore[union-attr]
    }
    if parts == ("ffn",):  # 108 neurons: no block divides them
        assert quantized["ffn"] == [True, True, False] * 2
    for part, flags in quantized.items():
        assert any(flags) == (part in parts)


def test_stands_behind_sparse_ffns(tmp_path: Path) -> None:
    """Attention in integers, FFNs by their own rows: the recipe of a decoder."""
    graph = canonical(zoo.exported("llama"))
    steps = [FFNTopK(density=1.0, weights="int8"), WeightOnly(bits=8, parts=("attention", "head"))]
    results = run_passes(graph, steps, PassContext(profile_of(graph), EVERYTHING))
    assert all(result.changed for result in results)
    save_graph(graph, tmp_path / "both.onnx")
    feeds = zoo.feeds("llama", 2, 7, seeded())
    (dense,), (ours,) = outputs(zoo.exported("llama"), feeds), outputs(tmp_path / "both.onnx", feeds)
    assert 0 < np.linalg.norm(ours - dense) < 0.03 * np.linalg.norm(dense)


def test_what_no_block_divides_is_left_with_a_reason() -> None:
    graph = canonical(zoo.exported("gemma"))  # 40 wide
    result = rewrite(graph)
    assert any("no block of 16 or more divides its 40" in left.why for left in result.left)


def test_a_target_without_integer_weights_refuses() -> None:
    with pytest.raises(PassError, match="does not multiply with int4"):
        run_passes(
            canonical(zoo.exported("llama")), [WeightOnly(bits=4)], PassContext(None, Capability(frozenset({8})))
        )


@pytest.mark.parametrize("by_largest", [False, True])
def test_weights_too_small_for_a_scale_become_zeros(by_largest: bool) -> None:
    """Of int4 a scale fits bfloat16, which has no number below 9e-41."""
    weight = np.full((32, 3), 3e-40, np.float32)
    weight[:, 1], weight[0, 2] = 0, 1
    with np.errstate(divide="raise", invalid="raise"):
        matrix = round_to_nearest(weight, 4, 32, by_largest=by_largest)
    assert np.isfinite(matrix.array).all() and np.all(matrix.scale != 0)
    np.testing.assert_allclose(matrix.array[:, :2], 0, atol=1e-12)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("stored", "computed"),
    [("float16", "float16"), ("float16", "float"), ("bfloat16", "float"), ("bfloat16", "bfloat16")],
)
def test_weights_in_half_precision(bits: int, stored: str, computed: str, tmp_path: Path) -> None:
    """Behind a Cast to float32 or not: the product stays in the type that it had; ONNX Runtime has none of bfloat16."""
    number = onnx.TensorProto.DataType.Value
    cast, rng = f"Cast <to = {number(computed.upper())}>", seeded()
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g ({computed}[B, S, 32] x) => ({computed}[B, S, 32] y) {{ '
        f"u = {cast} (up) h = MatMul (x, u) a = Relu (h) d = {cast} (down) z = MatMul (a, d) y = Add (x, z) }}"
    )
    for name, shape in (("up", (32, 64)), ("down", (64, 32))):
        array = rng.standard_normal(shape).astype(np.float32) / 6
        array = array.astype(onnx.helper.tensor_dtype_to_np_dtype(number(stored.upper())))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "dense.onnx")
    graph = canonical(tmp_path / "dense.onnx")
    result = rewrite(graph, bits=bits)
    if computed == "bfloat16":
        assert {left.why for left in result.left} == {"it computes in bfloat16"} and not result.changed
        return
    assert result.changed == 2 and not result.left
    save_graph(graph, tmp_path / "int.onnx")
    x = {"x": rng.standard_normal((2, 5, 32)).astype(np.float16 if computed == "float16" else np.float32)}
    (dense,), (ours,) = (outputs(tmp_path / f"{name}.onnx", x) for name in ("dense", "int"))
    assert ours.dtype == x["x"].dtype
    error = np.linalg.norm((ours - dense).astype(np.float32)) / np.linalg.norm((dense - x["x"]).astype(np.float32))
    assert 0 < error < {8: 0.02, 4: 0.2}[bits]
