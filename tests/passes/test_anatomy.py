"""Every family from every exporter has the parts that its configuration says, whatever nodes and tensors are called."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import zoo
from seeds import seeded
from written import tower

from trimtab.passes.anatomy import Anatomy, find_anatomy, require_ffns
from trimtab.passes.anatomy.activation import KNOWN
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import is_external, load_graph, save_graph
from trimtab.passes.graph.linear import Linear


@dataclass(frozen=True)
class Want:
    layers: int
    d_model: int
    d_ff: int
    activation: str
    gated: bool
    heads: tuple[int, int, int]  # query, key-value, size
    head: tuple[int, ...]  # widths of the head's projections
    embeddings: int
    family: str


WANT = {
    "bert": Want(3, 48, 80, "gelu", False, (4, 4, 12), (48, 3), 3, "bert"),
    "roberta": Want(2, 40, 72, "gelu", False, (5, 5, 8), (40, 5), 3, "bert"),
    "distilbert": Want(3, 48, 88, "gelu", False, (3, 3, 16), (), 2, "bert"),
    "vit": Want(2, 36, 68, "gelu", False, (3, 3, 12), (7,), 0, "vit"),
    "gpt2": Want(2, 40, 104, "gelu_tanh", False, (5, 5, 8), (109,), 2, "gpt2"),
    "opt": Want(3, 48, 92, "relu", False, (3, 3, 16), (113,), 2, "opt"),
    "gpt_neox": Want(2, 48, 116, "gelu", False, (3, 3, 16), (127,), 1, "gpt_neox"),
    "llama": Want(2, 64, 108, "silu", True, (4, 2, 16), (131,), 1, "llama"),
    "qwen2": Want(2, 48, 124, "silu", True, (6, 2, 8), (137,), 1, "qwen2"),
    "gemma": Want(2, 40, 136, "gelu_tanh", True, (4, 1, 16), (139,), 1, "gemma"),
    "t5": Want(2, 40, 96, "relu", False, (4, 4, 12), (), 2, "t5"),
}
CASES = [(family, exporter) for family in zoo.FAMILIES for exporter in ("dynamo", "torchscript")] + [("llama", "genai")]


def canonical(path: Path) -> gs.Graph:
    graph = load_graph(path)
    Canonicalize().run(graph, PassContext())
    return graph


def facts(anatomy: Anatomy) -> dict[str, object]:
    """What must not depend on names and order."""
    return {
        "family": anatomy.family,
        "params": anatomy.params,
        "ffns": [(f.layer, f.gated, f.activation.name, f.d_model, f.d_ff, f.params) for f in anatomy.ffns],
        "ffn weights": [[m.w().sum().item() for m in f.linears] for f in anatomy.ffns],
        "attentions": [(a.heads, a.kv_heads, a.head_dim, a.params, len(a.nodes), a.fused) for a in anatomy.attentions],
        "attention weights": [[m.w().sum().item() for m in a.linears] for a in anatomy.attentions],
        "norms": len(anatomy.norms),
        "embeddings": sorted(tuple(e.table.shape) for e in anatomy.embeddings),
        "head": anatomy.head and ([m.out_features for m in anatomy.head.linears], anatomy.head.tied),
        "unrecognized": sorted((u.what, u.why) for u in anatomy.unrecognized),
    }


def project(linear: Linear, x: np.ndarray) -> np.ndarray:
    bias = linear.b()
    return x.astype(np.float64) @ linear.w().astype(np.float64) + (0 if bias is None else bias)


@pytest.mark.parametrize(("family", "exporter"), CASES)
def test_parts_of_every_family(family: str, exporter: str) -> None:
    want = WANT[family]
    anatomy = find_anatomy(canonical(zoo.exported(family, exporter)))
    assert anatomy.layers == len(anatomy.ffns) == len(anatomy.attentions) == want.layers
    for layer, ffn in enumerate(anatomy.ffns):
        assert ffn.layer == layer
        assert (ffn.d_model, ffn.d_ff, ffn.gated, ffn.activation.name) == (
            want.d_model, want.d_ff, want.gated, want.activation,
        )  # fmt: skip
        assert ffn.down.in_features == want.d_ff
    for attention in anatomy.attentions:
        assert (attention.heads, attention.kv_heads, attention.head_dim) == want.heads
        assert None not in (attention.q, attention.k, attention.v, attention.out)
        packed = attention.q is attention.k
        assert packed == (family in ("gpt2", "gpt_neox") or exporter == "genai")
    assert tuple(m.out_features for m in (anatomy.head.linears if anatomy.head else ())) == want.head
    assert len(anatomy.embeddings) == want.embeddings
    assert len(anatomy.norms) == 2 * want.layers + 1
    assert anatomy.family == want.family
    assert anatomy.unrecognized == ()
    assert require_ffns(anatomy) == anatomy.ffns


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_parameters_are_those_of_the_model(family: str) -> None:
    model = zoo.tiny_model(family)
    anatomy = find_anatomy(canonical(zoo.exported(family)))
    blocks = [
        p for name, p in model.named_parameters() if any(k in name for k in ("layer.", "layers.", ".h.", "block."))
    ]
    inside = sum(p.numel() for p in blocks if p.ndim > 1 and p.shape[1] not in (4,))  # T5's relative bias has 4 columns
    biases = sum(
        m.params - m.in_features * m.out_features for f in (*anatomy.ffns, *anatomy.attentions) for m in f.linears
    )
    assert sum(f.params for f in anatomy.ffns) + sum(a.params for a in anatomy.attentions) - biases == inside


def test_tied_heads() -> None:
    for family, tied in (("gpt2", True), ("gemma", True), ("opt", True), ("llama", False), ("gpt_neox", False)):
        head = find_anatomy(canonical(zoo.exported(family))).head
        assert head is not None
        assert head.tied == tied, family


@pytest.mark.parametrize(("family", "exporter"), CASES)
def test_names_and_order_do_not_matter(family: str, exporter: str) -> None:
    graph = canonical(zoo.exported(family, exporter))
    want = facts(find_anatomy(graph))
    rng = random.Random()
    fixed = {id(t) for t in (*graph.inputs, *graph.outputs)}
    for i, tensor in enumerate(t for t in graph.tensors().values() if id(t) not in fixed and t.name):
        tensor.name = f"{rng.random()}{i}"
    for i, node in enumerate(graph.nodes):
        node.name = f"{rng.random()}{i}" if rng.random() < 0.5 else ""
    rng.shuffle(graph.nodes)
    assert facts(find_anatomy(graph)) == want


@pytest.mark.parametrize(("family", "exporter"), [case for case in CASES if case[1] != "genai"])
def test_hidden_is_what_the_anatomy_says(family: str, exporter: str, tmp_path: Path) -> None:
    """Run the graph with x, hidden and y as further outputs, and compute hidden and y from x in float64."""
    graph = canonical(zoo.exported(family, exporter))
    ffns = find_anatomy(graph).ffns
    for ffn in ffns:
        for tensor in (ffn.x, ffn.hidden, ffn.y):
            tensor.dtype = np.float32
            graph.outputs.append(tensor)
    save_graph(graph, tmp_path / "model.onnx")
    runner = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    results = runner.run([t.name for t in graph.outputs], zoo.feeds(family, 2, 9, seeded()))
    found = iter(results[-3 * len(ffns) :])
    for ffn, x, hidden, y in zip(ffns, found, found, found, strict=True):
        act = KNOWN[ffn.activation.name]
        up = project(ffn.up, x)
        want = act(up) if ffn.gate is None else act(project(ffn.gate, x)) * up
        np.testing.assert_allclose(hidden.astype(np.float64), want, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(y.astype(np.float64), project(ffn.down, want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_weights_stay_unread(family: str, tmp_path: Path) -> None:
    save_graph(load_graph(zoo.exported(family)), tmp_path / "model.onnx")
    anatomy = find_anatomy(canonical(tmp_path / "model.onnx"))
    linears = [m for block in (*anatomy.ffns, *anatomy.attentions) for m in block.linears]
    assert linears
    assert all(is_external(linear.weight) for linear in linears)
    assert all(is_external(embedding.table) for embedding in anatomy.embeddings if embedding.params > 256)


def test_deep_graphs() -> None:
    """Hundreds of layers, in reverse order: no recursion limit, and no quadratic time."""
    layers = 400
    graph = tower(layers)
    anatomy = find_anatomy(graph)
    assert [ffn.layer for ffn in anatomy.ffns] == list(range(layers))
    Canonicalize().run(graph, PassContext())
    assert len(find_anatomy(graph).ffns) == layers


def test_require_ffns_says_why() -> None:
    x = gs.Variable("x", np.float32, ["N", 4])
    y = gs.Variable("y", np.float32, ["N", 4])
    graph = gs.Graph([gs.Node("Relu", inputs=[x], outputs=[y])], inputs=[x], outputs=[y], opset=20)
    with pytest.raises(ModelError, match="no FFN was found"):
        require_ffns(find_anatomy(graph))
