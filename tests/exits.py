"""Encoders with exits behind their first layers, as one graph and cut into one for each part of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import zoo
from rewrite import canonical, session

from trimtab.compiler.targets.segmented.compaction import Compaction, Exit, Layout
from trimtab.compiler.targets.tensorrt.segments import cut_at
from trimtab.passes.graph import save_graph, topological

EXITS = (0, 1)
"""Layers that samples may leave behind."""

MARGIN = 0.05
"""How far thresholds lie from probabilities, so that no rounding decides."""


class Exiting:
    """A tiny classifier of `family`, with a head of random weights behind each layer of `EXITS`.

    A sample leaves where its largest probability is not below its `threshold`, an input [batch, exits].

    Attributes:
        whole: the session of one graph, which computes every head: `early.N` [batch, classes], `stays.N` [batch], and
            `logits`, for all samples.
        parts: the ONNX files of the segments.
        hook: what lets samples leave between them.
    """

    def __init__(self, family: str, folder: Path, rng: np.random.Generator) -> None:
        self._family, self._rng = family, rng
        graph = canonical(zoo.exported(family, "dynamo"))
        graph.inputs.append(gs.Variable("threshold", np.float32, ["batch", len(EXITS)]))
        classes = graph.outputs[0].shape[-1]
        norms = [node for node in topological(graph) if node.op == "LayerNormalization"]
        ends = [norms[2 * (layer + 1)] for layer in EXITS]
        streams = [norm.inputs[0] if family == "vit" else norm.outputs[0] for norm in ends]  # its norms are in front
        points = [_exit(graph, x, layer, classes, rng) for x, layer in zip(streams, EXITS, strict=True)]
        save_graph(graph, folder / "whole.onnx")
        self.inputs = [tensor.name for tensor in graph.inputs]
        self.whole = session(folder / "whole.onnx")
        self.parts = []
        for number, part in enumerate(cut_at(graph, points)):
            self.parts.append(folder / f"part.{number}.onnx")
            save_graph(part, self.parts[-1])
        self.hook = Compaction(
            [Exit(layer, f"stays.{layer}", {"logits": f"early.{layer}"}) for layer in EXITS],
            Layout(frozenset([*self.inputs, *(f"{name}.{layer}" for layer in EXITS for name in ("on", "limit"))])),
        )

    def feeds(self, batch: int, tokens: int, leave: np.ndarray) -> dict[str, np.ndarray]:
        """Random inputs.

        Args:
            leave: [batch], the number of the exit that each sample shall leave by; `len(EXITS)` for none.
        """
        feeds = zoo.feeds(self._family, batch, tokens, self._rng)
        feeds["threshold"] = np.zeros((batch, len(EXITS)), np.float32)
        for number, layer in enumerate(EXITS):
            (logits,) = self.whole.run([f"early.{layer}"], feeds)
            likeliest = np.exp(logits).max(-1) / np.exp(logits).sum(-1)
            feeds["threshold"][:, number] = likeliest + np.where(leave > number, MARGIN, -MARGIN)
        return feeds

    def alone(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """Answers of samples that are run one by one, [batch, classes]."""
        answers = []
        for row in range(len(feeds["threshold"])):
            given = {name: value[row : row + 1] for name, value in feeds.items()}
            outputs = [tensor.name for tensor in self.whole.get_outputs()]
            found = dict(zip(outputs, self.whole.run(None, given), strict=True))
            answers.append(next((found[f"early.{n}"] for n in EXITS if not found[f"stays.{n}"][0]), found["logits"])[0])
        return np.array(answers)


def _exit(graph: gs.Graph, x: gs.Variable, layer: int, classes: int, rng: np.random.Generator) -> gs.Variable:
    """Add a head behind `x`, the end of `layer`; the tensor that the next layer goes on from."""
    width = int(x.shape[-1])
    goes_on = gs.Variable(f"on.{layer}", np.float32, x.shape)
    for node in list(x.outputs):
        node.inputs = [goes_on if tensor is x else tensor for tensor in node.inputs]

    def add(op: str, inputs: list[gs.Tensor | np.ndarray], count: int = 1, **attributes: object) -> list[gs.Variable]:
        given = [
            value if isinstance(value, gs.Tensor) else gs.Constant(f"{op}.{layer}.{place}.{len(graph.nodes)}", value)
            for place, value in enumerate(inputs)
        ]
        outputs = [gs.Variable(f"{op}.{layer}.{len(graph.nodes)}.{place}") for place in range(count)]
        graph.nodes.append(gs.Node(op, f"{op}.{layer}.{len(graph.nodes)}", attributes, given, outputs))
        return outputs

    graph.nodes.append(gs.Node("Identity", f"goes_on.{layer}", inputs=[x], outputs=[goes_on]))
    (first,) = add("Gather", [x, np.array(0)], axis=1)
    (early,) = add("MatMul", [first, rng.normal(0, 3 / np.sqrt(width), (width, classes)).astype(np.float32)])
    (likely,) = add("Softmax", [early], axis=-1)
    best, _ = add("TopK", [likely, np.array([1])], 2)
    (best,) = add("Squeeze", [best, np.array([1])])
    threshold = next(tensor for tensor in graph.inputs if tensor.name == "threshold")
    (limit,) = add("Gather", [threshold, np.array(EXITS.index(layer))], axis=1)
    (stays,) = add("Less", [best, limit])
    limit.name, limit.dtype, limit.shape = f"limit.{layer}", np.float32, ["batch"]
    early.name, early.dtype, early.shape = f"early.{layer}", np.float32, ["batch", classes]
    stays.name, stays.dtype, stays.shape = f"stays.{layer}", bool, ["batch"]
    graph.outputs += [early, stays]
    return goes_on
