"""PackedAttention made ready for TensorRT: one launch, or two where what tokens receive is wanted."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from dialects import finish, graph_of
from plugged import back, run

from trimtab.plugins import DOMAIN, PACKED_ATTENTION, add_multi_output_node
from trimtab.plugins.tensorrt import Prepared, plugins_of, prepare

pytest.importorskip("triton", reason="the kernels need the package triton")
HEADS, DIM = 4, 24


def layer(kind: type, given: list[str], received: bool) -> gs.Graph:
    """One attention with the inputs `given`; its last output is the graph's."""
    kv_heads = 2
    columns = HEADS if "k" in given else HEADS + 2 * kv_heads
    shapes: dict[str, tuple[type, list[int | str]]] = {
        "q": (kind, ["T", columns * DIM]),
        "k": (kind, ["T", kv_heads * DIM]),
        "v": (kind, ["T", kv_heads * DIM]),
        "offsets": (np.int32, ["ends"]),
        "bias": (kind, [1, HEADS, "places", "places"]),
        "scale": (np.float32, []),
    }
    graph = graph_of(**{name: shape for name, shape in shapes.items() if name in given})
    names = ["context", "received"] if received else ["context"]
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    outputs = add_multi_output_node(graph, PACKED_ATTENTION, inputs, "layer", names, heads=HEADS, kv_heads=kv_heads)
    graph.outputs = list(outputs)[::-1]
    return graph


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("received", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_launches_compute_what_the_op_does(packed: bool, received: bool, kind: type) -> None:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    given = ["q", "offsets", *([] if packed else ["k", "v"]), *rng.choice(["bias", "scale"], rng.integers(3), False)]
    graph = layer(kind, given, received)
    before = finish(graph, *graph.outputs)
    prepared = prepare(graph)
    model = finish(graph, *graph.outputs)
    assert prepared.left == {} and plugins_of(model) == prepared.plugins
    assert [name.split("Plugin")[0] for name in prepared.plugins] == (
        ["AttentionReceived", "AttentionRows"] if received else ["AttentionRows"]
    )
    assert not model.functions and not any("" in node.input for node in model.graph.node)
    again = gs.import_onnx(model)
    back(again)
    after = finish(again, *again.outputs)
    for lengths in ([7, 1, 0, 30], [0], []):
        size = {"T": sum(lengths), "ends": len(lengths) + 1, "places": max(lengths, default=0) + 2}
        feeds = {
            tensor.name: rng.standard_normal([size.get(n, n) for n in tensor.shape]).astype(tensor.dtype)
            for tensor in graph.inputs
        } | {"offsets": np.array([0, *itertools.accumulate(lengths)], np.int32)}
        found, wanted = run(after, feeds), run(before, feeds)
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 if received or kind is np.float32 else 2e-3)


def test_widths_that_nobody_knows_stay() -> None:
    graph = graph_of(q=(np.float16, ["T", "width"]), offsets=(np.int32, ["ends"]))
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    graph.outputs = list(add_multi_output_node(graph, PACKED_ATTENTION, inputs, "layer", heads=2))
    assert prepare(graph) == Prepared((), {"layer": "the width of q is not known before the engine runs"})
    assert [node.op for node in graph.nodes if node.domain == DOMAIN] == ["PackedAttention"]
    assert [len(node.outputs) for node in graph.nodes] == [2]
    assert [f.name for f in graph.functions] == ["PackedAttention"]
