"""Rewrites the dialect's nodes of a graph so that TensorRT's parser finds plugins for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.plugins import OPS, SPARSE_UP
from trimtab.plugins.dialect import DOMAIN, Form, Op
from trimtab.plugins.emit import add_body, type_of
from trimtab.plugins.sparse_up.keep import KEEP_LARGEST
from trimtab.plugins.tensorrt.kernels import divider, has_kernel, kernel_of
from trimtab.plugins.tensorrt.names import PLUGINS, Plugin

__all__ = ["Prepared", "prepare", "split_keep"]


@dataclass(frozen=True)
class Prepared:
    """Result of the rewrite.

    Attributes:
        plugins: names of those that the graph needs now, for `register`.
        left: name of each node that stays as it was, its reference body to be inlined, and why.
    """

    plugins: tuple[str, ...]
    left: dict[str, str]


def prepare(graph: gs.Graph) -> Prepared:
    """Make the dialect's nodes of `graph`, in place, nodes of plugins; their reference bodies go.

    A plugin's node is called like the plugin, has the inputs and outputs that are given and no others, every attribute
    as an integer in the order of the declaration, and what TensorRT's parser wants to know: namespace, version, and
    that the kernel is to be embedded. A node of several launches becomes as many nodes. Nodes without a kernel on the
    GPU stay, as standard ops within their reference bodies.

    Raises:
        RuntimeError: the package `triton` is missing.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the kernels of plugins need the package triton; pip install triton")
    split_keep(graph)
    used: set[str] = set()
    left: dict[str, str] = {}
    for part in _parts(graph):
        for node in list(part.nodes):
            op = OPS.get(node.op) if node.domain == DOMAIN else None
            if op is None:
                continue
            launches = _launches(op, node)
            if (reason := _refused(op, launches, node)) is not None:
                left[node.name] = reason
                continue
            used.update(_to_plugins(part, node, launches))
    _drop_unused(graph)
    return Prepared(tuple(sorted(used)), left)


@dataclass(frozen=True)
class _Launch:
    """One launch of a node: its op, and its inputs and outputs by name."""

    op: Op
    given: dict[str, gs.Tensor]
    named: dict[str, gs.Tensor]

    @property
    def plugin(self) -> Plugin:
        return Plugin(self.op, tuple(self.given), tuple(self.named))


def _launches(op: Op, node: gs.Node) -> list[_Launch]:
    """The launches of a node, in order: the node itself, if its op is one launch."""
    given, named = _given(op, node), _named(op, node)
    divide = divider(op)
    return [_Launch(op, given, named)] if divide is None else [_Launch(*part) for part in divide(node, given, named)]


def _to_plugins(part: gs.Graph, node: gs.Node, launches: list[_Launch]) -> list[str]:
    """Replace `node` by a plugin's node for each launch; returns the plugins' names."""
    at, attributes = part.nodes.index(node), node.attrs
    node.inputs, node.outputs = [], []
    plugins = []
    for number, launch in enumerate(launches):
        attrs = launch.plugin.encode(attributes) | {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
        name = node.name if number == 0 else f"{node.name}/{launch.op.name}"
        inputs, outputs = list(launch.given.values()), list(launch.named.values())
        plugins.append(gs.Node(launch.plugin.name, name, attrs, inputs, outputs, domain=DOMAIN))
    part.nodes[at : at + 1] = plugins
    return [each.op for each in plugins]


def split_keep(graph: gs.Graph) -> None:
    """Divide each SparseUp that keeps the largest of its blocks in two: all of their activations, and KeepLargest.

    A launch that spreads over the GPU has no place where one token's activations come together.
    """
    divided = False
    for part in _parts(graph):
        for node in list(part.nodes):
            if (node.domain, node.op) != (DOMAIN, SPARSE_UP.name):
                continue
            given = _given(SPARSE_UP, node)
            importance = given.pop("importance", None)
            if importance is None:
                continue
            if not divided:  # all SparseUp of a model have one form, so they all lose their importance
                _drop(graph, SPARSE_UP)
                divided = True
            node.inputs = [given.get(i.name, gs.Variable.empty()) for i in SPARSE_UP.inputs]
            keep, node.attrs = int(node.attrs["keep"]), node.attrs | {"keep": 0}
            add_body(graph, SPARSE_UP, Form({name: type_of(t) for name, t in given.items()}, node.attrs))
            if keep > 0:
                _keep(graph, part, node, given["blocks"], importance, keep)


def _keep(graph: gs.Graph, part: gs.Graph, node: gs.Node, blocks: gs.Tensor, importance: gs.Tensor, keep: int) -> None:
    """KeepLargest behind a SparseUp that computes all."""
    (result,) = node.outputs
    whole = gs.Variable(f"{result.name}/all", result.dtype, result.shape)
    node.outputs = [whole]
    inputs = {"h": whole, "blocks": blocks, "importance": importance}
    attributes = {"block": int(node.attrs["block"]), "keep": keep}
    add_body(graph, KEEP_LARGEST, Form({name: type_of(t) for name, t in inputs.items()}, attributes))
    keeping = gs.Node(KEEP_LARGEST.name, f"{node.name}/keep", attributes, [*inputs.values()], [result], domain=DOMAIN)
    part.nodes.insert(part.nodes.index(node) + 1, keeping)


def _parts(graph: gs.Graph) -> Iterator[gs.Graph]:
    yield graph
    yield from graph.subgraphs(recursive=True)


def _given(op: Op, node: gs.Node) -> dict[str, gs.Tensor]:
    """Inputs by name; those left out are empty, or missing at the end."""
    return {i.name: t for i, t in zip(op.inputs, node.inputs, strict=False) if not t.is_empty()}


def _named(op: Op, node: gs.Node) -> dict[str, gs.Tensor]:
    """Outputs by name; those that the node leaves unnamed are empty, or missing at the end."""
    return {o.name: t for o, t in zip(op.outputs, node.outputs, strict=False) if not t.is_empty()}


def _refused(op: Op, launches: list[_Launch], node: gs.Node) -> str | None:
    """Why plugins cannot compute a node, or None."""
    if not has_kernel(op):
        return "the op has no kernel for GPUs"
    return next((reason for launch in launches if (reason := _refused_launch(launch, node)) is not None), None)


def _refused_launch(launch: _Launch, node: gs.Node) -> str | None:
    given = launch.given
    form = Form({name: type_of(tensor) for name, tensor in given.items()}, node.attrs)
    shapes = {name: tensor.shape for name, tensor in given.items()}
    for i in launch.op.inputs:
        if i.name in given and form.given[i.name] not in i.types:
            return f"{i.name} is {form.given[i.name]}"
        known = shapes.get(i.name, [0])
        if i.role == "rows" and not (known and isinstance(known[-1], int)):
            return f"the size of {i.name} is not known before the engine runs"
    if launch.plugin.name not in PLUGINS:
        return "an input that it needs is left out"
    return kernel_of(launch.op).refuses(form, shapes)


def _drop(graph: gs.Graph, op: Op) -> None:
    graph.functions = [f for f in graph.functions if (f.domain, f.name) != (DOMAIN, op.name)]


def _drop_unused(graph: gs.Graph) -> None:
    """Reference bodies that no node of the graph or of other functions uses."""
    asked = {(n.domain, n.op) for part in [*_parts(graph), *graph.functions] for n in part.nodes}
    graph.functions = [f for f in graph.functions if f.domain != DOMAIN or (f.domain, f.name) in asked]
