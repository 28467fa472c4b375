"""How clear the choices of a graph are: where two blocks weigh nearly the same, either may be taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rewrite import session

from trimtab.passes.graph import load_graph, save_graph, values
from trimtab.plugins.tensorrt.prepare import split_keep

Feeds = Mapping[str, np.ndarray]


def clearness(path: Path) -> Callable[[Feeds], float]:
    """A function of a model's inputs: the least distance between a block that is taken and the next, of their spread.

    Two ways to compute a model agree on its choices where this is far more than what they round differently.
    """
    graph = load_graph(path)
    split_keep(graph)  # all activations can be seen then, and what is kept of them
    nodes = [node for node in graph.nodes if node.op in ("SelectBlocks", "KeepLargest")]
    graph.outputs = list({id(tensor): tensor for node in nodes for tensor in node.inputs[:2]}.values())
    if nodes:
        copy = path.with_name(f"{path.stem}-choices.onnx")
        save_graph(graph, copy)
        run = session(copy)
    importance = {node.name: np.array(values(node.inputs[2])) for node in nodes if node.op == "KeepLargest"}

    def least(feeds: Feeds) -> float:
        if not nodes:
            return np.inf
        given = {tensor.name: feeds[tensor.name] for tensor in run.get_inputs()}
        found = dict(zip([tensor.name for tensor in graph.outputs], run.run(None, given), strict=True))
        gaps = [np.inf]
        for node in nodes:
            first, *others = (found[tensor.name] for tensor in node.inputs[:2])
            rows = first.reshape(-1, first.shape[-1]).astype(np.float64)
            if node.op == "SelectBlocks":
                gaps.append(_selected(rows, node.attrs))
            else:
                gaps.append(_kept(rows, others[0], importance[node.name], node.attrs))
        return min(gaps)

    return least


def _selected(scores: np.ndarray, attributes: Mapping[str, Any]) -> float:
    k, shards = int(attributes["k"]), int(attributes["shards"])
    if 0 <= int(attributes["dense_above"]) < len(scores):
        return np.inf
    if attributes["shared"]:
        scores = scores.max(0, keepdims=True)
    assert k % shards == 0, "each shard hands on all that it chooses"
    return _gap(scores.reshape(len(scores) * shards, -1), k // shards)


def _kept(h: np.ndarray, blocks: np.ndarray, importance: np.ndarray, attributes: Mapping[str, Any]) -> float:
    size = int(attributes["block"])
    weights = importance.reshape(-1, size)[blocks].reshape(len(blocks), -1)
    return _gap((np.abs(h) * weights).reshape(len(h), -1, size).sum(-1), int(attributes["keep"]))


def _gap(rows: np.ndarray, k: int) -> float:
    if k >= rows.shape[1]:
        return np.inf
    order = -np.sort(-rows, 1)
    spread = np.subtract(*np.percentile(rows, (75, 25), axis=1))
    return float(((order[:, k - 1] - order[:, k]) / np.maximum(spread, 1e-30)).min())
