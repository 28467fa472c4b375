"""ONNX's own Attention in products and a softmax, where no kernel takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from seeds import seeded

from trimtab.passes.errors import ModelError
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.lower import lower

HEADS, WIDTH, PAST = 4, 6, 3


def answers(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)  # type: ignore[no-any-return]


def attending(attributes: str, *, kv_heads: int, flat: bool, masked: bool, cached: bool, kind: str) -> onnx.ModelProto:
    """Attention by itself, in the form that is asked for."""

    def shape(heads: int, tokens: str) -> str:
        return f"B, {tokens}, {heads * WIDTH}" if flat else f"B, {heads}, {tokens}, {WIDTH}"

    inputs = [f"{kind}[{shape(HEADS, 'S')}] q"] + [f"{kind}[{shape(kv_heads, 'S')}] {name}" for name in "kv"]
    outputs = [f"{kind}[{shape(HEADS, 'S')}] y"]
    names = ["q", "k", "v", "mask" if masked else "", *(["pk", "pv"] if cached else [])]
    inputs += [f"{kind}[S, T] mask"] if masked else []
    if cached:
        inputs += [f"{kind}[B, {kv_heads}, P, {WIDTH}] {name}" for name in ("pk", "pv")]
        outputs += [f"{kind}[B, {kv_heads}, T, {WIDTH}] {name}" for name in ("ok", "ov")]
    heads = f"q_num_heads = {HEADS}, kv_num_heads = {kv_heads}" if flat else ""
    given = ", ".join(part for part in (heads, attributes) if part)
    return onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 23]> g ({", ".join(inputs)}) => ({", ".join(outputs)}) '
        f"{{ y{', ok, ov' if cached else ''} = Attention {f'<{given}>' if given else ''} ({', '.join(names)}) }}"
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("attributes", "kv_heads", "masked", "cached"),
    [("", 4, False, False), ("is_causal = 1", 2, False, False), ("scale = 0.3", 1, True, False),
     ("is_causal = 1", 2, False, True), ("softcap = 2.0", 4, True, True)],
)  # fmt: skip
def test_computes_the_same(
    tmp_path: Path, flat: bool, attributes: str, kv_heads: int, masked: bool, cached: bool
) -> None:
    model = attending(attributes, kv_heads=kv_heads, flat=flat, masked=masked, cached=cached, kind="float")
    onnx.save(model, tmp_path / "before.onnx")
    graph = load_graph(tmp_path / "before.onnx")
    assert lower(graph) == {"Attention": 1}
    assert "Attention" not in {node.op for node in graph.nodes}
    save_graph(graph, tmp_path / "after.onnx")
    rng = seeded()
    for batch, tokens in ((1, 1), (3, 5)):
        sizes = {"B": batch, "S": tokens, "P": PAST, "T": tokens + PAST * cached}
        feeds = {
            value.name: rng.standard_normal(
                [sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
            ).astype(np.float32)
            for value in model.graph.input
        }
        want, have = (answers(tmp_path / f"{name}.onnx", feeds) for name in ("before", "after"))
        for one, other in zip(want, have, strict=True):
            np.testing.assert_allclose(other, one, atol=2e-5)


def test_half_precision_keeps_its_kernels(tmp_path: Path) -> None:
    model = attending("is_causal = 1", kv_heads=2, flat=False, masked=False, cached=False, kind="float16")
    onnx.save(model, tmp_path / "model.onnx")
    graph = load_graph(tmp_path / "model.onnx")
    assert lower(graph) == {} and [node.op for node in graph.nodes] == ["Attention"]


def test_a_query_without_axes_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 23, "own": 1]> g (float[n] x) => (float y) '
        "{ q = own.Unknown (x) y = Attention (q, q, q) }"
    )
    model.graph.node[1].name = "layer 3"
    onnx.save(model, tmp_path / "model.onnx")
    graph = load_graph(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="layer 3: the rank of its query"):
        lower(graph)
