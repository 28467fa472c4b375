"""A small random encoder of packed tokens, classifying, and what it computes in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from scipy.special import erf, softmax

from trimtab.passes.graph import constant, insert
from trimtab.plugins import PACKED_ATTENTION, add_node


def exit_weights(rng: np.random.Generator, after: int, kind: str, width: int, classes: int) -> dict[str, np.ndarray]:
    """Random weights, named as training does, of an exit "light", "first" or "fastbert" behind `after` layers."""
    hidden = 8
    inputs = {"light": 2 * width, "first": width}.get(kind, hidden)
    sizes = {"dense": (hidden, inputs), "out": (classes, hidden)}
    if kind == "fastbert":
        sizes |= dict.fromkeys(("query", "key", "value", "attended"), (hidden, hidden))
        sizes["narrow"] = (hidden, width)
    found = {f"{n}.weight": rng.normal(size=size) * 2 / np.sqrt(size[1]) for n, size in sizes.items()}
    found |= {f"{n}.bias": rng.normal(size=size[0]) for n, size in sizes.items()}
    if kind != "fastbert":
        found |= {"norm.weight": rng.uniform(0.5, 1.5, inputs), "norm.bias": rng.normal(size=inputs)}
    return {f"exit.{after}.{name}": value.astype(np.float32) for name, value in found.items()}


Stays = Callable[[np.ndarray, int], np.ndarray]


class Encoder:
    """Layers as BERT's, behind whose last one the first token of each sample is classified."""

    def __init__(self, seed: int, layers: int = 4, width: int = 24, heads: int = 3, classes: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.layers, self.width, self.heads, self.classes = layers, width, heads, classes
        self.weights: dict[str, np.ndarray] = {}
        for layer in range(layers):
            for name in ("q", "k", "v", "out"):
                self._linear(f"{layer}.{name}", width, width)
            self._linear(f"{layer}.up", width, 2 * width)
            self._linear(f"{layer}.down", 2 * width, width)
            for name in ("norm1", "norm2"):
                self.weights[f"{layer}.{name}.scale"] = self.rng.uniform(0.5, 1.5, width)
                self.weights[f"{layer}.{name}.shift"] = self.rng.normal(size=width)
        self._linear("pool", width, width)
        self._linear("classify", width, classes)

    def _linear(self, name: str, inputs: int, outputs: int) -> None:
        self.weights[f"{name}.w"] = self.rng.normal(size=(inputs, outputs)) * 1.5 / np.sqrt(inputs)
        self.weights[f"{name}.b"] = self.rng.normal(size=outputs)

    def exit(self, after: int, kind: str) -> dict[str, np.ndarray]:
        """Random weights of an exit, as training names them."""
        return exit_weights(self.rng, after, kind, self.width, self.classes)

    def graph(self) -> gs.Graph:
        """Inputs lengths [batch], int32, and x [rows, width]; output logits [batch, classes]."""
        lengths = gs.Variable("lengths", np.int32, ["batch"])
        x: Any = gs.Variable("x", np.float32, ["rows", self.width])
        graph = gs.Graph(inputs=[lengths, x], opset=21, ir_version=10)

        def node(op: str, inputs: list[gs.Tensor], name: str, shape: list[Any], **attrs: Any) -> gs.Variable:
            y = insert(graph, op, inputs, name, attrs=attrs, dtype=inputs[0].dtype)
            y.shape = shape
            return y

        def number(name: str, value: Any) -> gs.Constant:
            return constant(name, np.asarray(value))

        def linear(x: gs.Tensor, name: str) -> gs.Variable:
            w, b = (number(f"{name}.{part}", self.weights[f"{name}.{part}"].astype(np.float32)) for part in "wb")
            size = [x.shape[0], w.shape[1]]
            return node("Add", [node("MatMul", [x, w], f"{name}/product", size), b], f"{name}/y", size)

        def norm(x: gs.Tensor, name: str) -> gs.Variable:
            parts = [number(f"{name}.{p}", self.weights[f"{name}.{p}"].astype(np.float32)) for p in ("scale", "shift")]
            return node("LayerNormalization", [x, *parts], f"{name}/y", list(x.shape), axis=-1)

        sums = node("CumSum", [lengths, number("axis", np.int64(0))], "sums", ["batch"])
        offsets = node("Concat", [number("none", np.zeros(1, np.int32)), sums], "offsets", ["starts"], axis=0)
        for layer in range(self.layers):
            given = {name: linear(x, f"{layer}.{name}") for name in ("q", "k", "v")} | {"offsets": offsets}
            context = add_node(graph, PACKED_ATTENTION, given, f"{layer}/context", heads=self.heads)
            context.shape = list(x.shape)
            size = list(x.shape)
            x = norm(node("Add", [x, linear(context, f"{layer}.out")], f"{layer}/sum1", size), f"{layer}.norm1")
            up = linear(x, f"{layer}.up")
            hidden = node("Gelu", [up], f"{layer}/hidden", list(up.shape))
            x = norm(node("Add", [x, linear(hidden, f"{layer}.down")], f"{layer}/sum2", size), f"{layer}.norm2")
        ends = [number(name, np.array([value])) for name, value in (("begin", 0), ("last", -1))]
        starts = node("Slice", [offsets, *ends], "starts", ["batch"])
        first = node("Gather", [x, starts], "first", ["batch", self.width], axis=0)
        pooled = node("Tanh", [linear(first, "pool")], "pooled", ["batch", self.width])
        logits = linear(pooled, "classify")
        logits.name = "logits"
        graph.outputs = [logits]
        return graph

    def states(self, x: np.ndarray, stays: Stays | None = None) -> list[np.ndarray]:
        """In front of the first layer and behind each, of one sample x [tokens, width], in float64.

        Args:
            stays: what each token receives in a layer, and the layer's number → which tokens stay behind its attention.
        """
        x = x.astype(np.float64)
        found = [x]
        for layer in range(self.layers):
            q, k, v = (self._apply(x, f"{layer}.{name}") for name in ("q", "k", "v"))
            context, received = attend(q, k, v, self.heads)
            if stays is not None:
                keep = stays(received, layer)
                context, x = context[keep], x[keep]
            x = self._norm(x + self._apply(context, f"{layer}.out"), f"{layer}.norm1")
            hidden = self._apply(x, f"{layer}.up")
            hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
            x = self._norm(x + self._apply(hidden, f"{layer}.down"), f"{layer}.norm2")
            found.append(x)
        return found

    def logits(self, x: np.ndarray) -> np.ndarray:
        """Of the last state of a sample."""
        return self._apply(np.tanh(self._apply(x[0], "pool")), "classify")

    def _apply(self, x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ self.weights[f"{name}.w"] + self.weights[f"{name}.b"])

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return normed(x) * self.weights[f"{name}.scale"] + self.weights[f"{name}.shift"]


def normed(x: np.ndarray) -> np.ndarray:
    return np.asarray((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention of one sample, [tokens, width] each; and what each token receives, [tokens]."""
    q, k, v = (t.reshape(len(t), heads, -1).swapaxes(0, 1) for t in (q, k, v))
    weights = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -1)
    return (weights @ v).swapaxes(0, 1).reshape(q.shape[1], -1), weights.mean((0, 1))


def stays(received: np.ndarray, setting: float, ratio: bool) -> tuple[np.ndarray, float]:
    """Which tokens of one sample stay, by what each receives, [tokens]; and how clear the closest choice is.

    Args:
        setting: the share that stays if `ratio`, and else the threshold.
    """
    level, n = received.astype(np.float64), len(received)
    level[0] = np.inf
    order = np.argsort(-level, kind="stable")
    count = min(2, n)
    if ratio:
        count = max(count, int(np.ceil(np.float32(setting) * np.float32(n))))
    keep = np.isin(np.arange(n), order[:count])
    near = [float(level[order[count - 1]] - level[order[count]])] if count < n else []
    if not ratio and setting > 0:
        near.append(float(np.abs(received - setting).min()))
        keep |= level >= setting
    return keep if ratio or setting > 0 else np.ones(n, bool), min(near, default=np.inf)


def exit_logits(weights: dict[str, np.ndarray], x: np.ndarray, after: int, kind: str) -> np.ndarray:
    """What an exit makes of the state x [tokens, width] of one sample, in float64."""
    own = {n.removeprefix(f"exit.{after}."): w.astype(np.float64) for n, w in weights.items()}

    def apply(x: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(x @ own[f"{name}.weight"].T + own[f"{name}.bias"])

    if kind == "fastbert":
        narrow = np.tanh(apply(x, "narrow"))
        read = apply(attend(*(apply(narrow, name) for name in ("query", "key", "value")), 2)[0][0], "attended")
    else:
        read = np.concatenate([x[0], x.mean(0)]) if kind == "light" else x[0]
        read = normed(read) * own["norm.weight"] + own["norm.bias"]
    return apply(np.tanh(apply(read, "dense")), "out")
