"""Exits from the Profile: small classifiers between layers, written into a graph of packed tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import constant, insert
from trimtab.passes.graph.segments import segment_first, segment_mean, segment_members

_HEADS = 2  # attention heads of FastBERT's exit
_MASKED = {"far": -1e9, "near": 0.0}  # added to the scores of other samples' tokens (far) and own tokens (near)
_EPSILON = 1e-5  # epsilon of torch's LayerNorm

Weights = Mapping[str, np.ndarray]
"""Torch's name of an exit's parameter → its values."""


def exits_of(learned: Weights) -> dict[int, dict[str, np.ndarray]]:
    """Number of layers → the weights of the exit after that many layers, read from `exit.<number>.<parameter>`."""
    exits: dict[int, dict[str, np.ndarray]] = {}
    for name, value in learned.items():
        kind, _, rest = name.partition(".")
        number, _, parameter = rest.partition(".")
        if kind == "exit" and number.isdecimal():
            exits.setdefault(int(number), {})[parameter] = value
    return dict(sorted(exits.items()))


class ExitHead:
    """One exit.

    The parameters identify one of two forms (arXiv 2004.02178 and `training/magic_pyramid/exits.py`): FastBERT's
    attention of the first token over all tokens; or a perceptron on the first token, or on the first and the mean.

    Args:
        after: number of layers before the exit; 0: before the first layer.
        width: hidden size of the model.
        classes: number of the model's classes.

    Raises:
        ProfileError: parameters are missing, or of other sizes than the model's.
    """

    def __init__(self, after: int, weights: Weights, width: int, classes: int) -> None:
        self.after, self._weights = after, weights
        self.attends = "narrow.weight" in weights
        names = ("narrow", "query", "key", "value", "attended", "dense", "out") if self.attends else ("dense", "out")
        required = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
        required += [] if self.attends else ["norm.weight", "norm.bias"]
        if missing := [name for name in required if name not in weights]:
            raise ProfileError(f"exit behind {after} layers: the profile lacks {missing[0]!r}", hint=_AGAIN)
        inputs = self._of("narrow" if self.attends else "dense").shape[1]
        self.mean = not self.attends and inputs == 2 * width
        if inputs != width and not self.mean:
            raise ProfileError(
                f"exit behind {after} layers: reads {inputs} numbers, the model has {width}", hint=_AGAIN
            )
        if (exit_classes := len(self._of("out"))) != classes:
            raise ProfileError(
                f"exit behind {after} layers: tells {exit_classes} classes, the model {classes}", hint=_AGAIN
            )

    def __call__(self, graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
        """Logits [batch, classes] of the packed tokens `x`, [T, width]."""
        if self.attends:
            return self._attend(graph, x, offsets, name)
        read = segment_first(graph, x, offsets, f"{name}/first")
        if self.mean:
            mean = segment_mean(graph, x, offsets, f"{name}/mean")
            read = insert(graph, "Concat", [read, mean], f"{name}/read", attrs={"axis": -1}, dtype=np.float32)
        scale, shift = (constant(f"{name}/norm/{p}", self._weights[f"norm.{p}"]) for p in ("weight", "bias"))
        attrs: dict[str, object] = {"axis": -1, "epsilon": _EPSILON}
        read = insert(graph, "LayerNormalization", [read, scale, shift], f"{name}/norm", attrs=attrs, dtype=np.float32)
        return self._classify(graph, read, name)

    def _attend(self, graph: gs.Graph, x: gs.Tensor, offsets: gs.Tensor, name: str) -> gs.Variable:
        """Attention of each sample's first token over the sample's tokens. No other row is computed.

        A sample without tokens attends to a row of zeros at the end, so that no softmax is empty.
        """

        def node(op: str, inputs: list[gs.Tensor], key: str, **attrs: object) -> gs.Variable:
            return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=np.float32)

        narrow = node("Tanh", [self._linear(graph, x, "narrow", name)], "tanh")
        q = self._linear(graph, segment_first(graph, narrow, offsets, f"{name}/first"), "query", name)
        hidden = self._of("query").shape[0]
        none = constant(f"{name}/none", np.zeros((1, hidden), np.float32))
        k, v = (node("Concat", [self._linear(graph, narrow, part, name), none], f"{part}/more", axis=0)
                for part in ("key", "value"))  # fmt: skip
        own = segment_members(graph, offsets, f"{name}/own", narrow)
        far, near = (constant(f"{name}/{key}", np.array(value, np.float32)) for key, value in _MASKED.items())
        mask = node("Where", [own, near, far], "mask")
        last = node("Expand", [constant(f"{name}/last", np.array([[_MASKED["far"] / 2]], np.float32)),
                               self._column(graph, q, name)], "mask/last")  # fmt: skip
        mask = node("Concat", [mask, last], "mask/more", axis=-1)
        keys = node("Transpose", [k], "keys", perm=[1, 0])
        context: gs.Variable | None = None
        for head in range(_HEADS):
            columns = (np.arange(hidden) * _HEADS // hidden == head).astype(np.float32)
            of_head = constant(f"{name}/head.{head}", columns)
            scale = constant(f"{name}/scale.{head}", columns * np.float32((hidden // _HEADS) ** -0.5))
            scores = node("MatMul", [node("Mul", [q, scale], f"query.{head}"), keys], f"scores.{head}")
            weights = node("Softmax", [node("Add", [scores, mask], f"masked.{head}")], f"weights.{head}", axis=-1)
            part = node("MatMul", [weights, node("Mul", [v, of_head], f"value.{head}")], f"context.{head}")
            context = part if context is None else node("Add", [context, part], f"sum.{head}")
        assert context is not None
        return self._classify(graph, self._linear(graph, context, "attended", name), name)

    @staticmethod
    def _column(graph: gs.Graph, x: gs.Tensor, name: str) -> gs.Variable:
        """The shape [rows of x, 1]."""
        one = constant(f"{name}/column/one", np.array([1], np.int64))
        rows = insert(graph, "Shape", [x], f"{name}/column/rows", attrs={"start": 0, "end": 1}, dtype=np.int64)
        return insert(graph, "Concat", [rows, one], f"{name}/column", attrs={"axis": 0}, dtype=np.int64)

    def _classify(self, graph: gs.Graph, x: gs.Tensor, name: str) -> gs.Variable:
        hidden = insert(graph, "Tanh", [self._linear(graph, x, "dense", name)], f"{name}/hidden", dtype=np.float32)
        return self._linear(graph, hidden, "out", name)

    def _linear(self, graph: gs.Graph, x: gs.Tensor, part: str, name: str) -> gs.Variable:
        weight = constant(f"{name}/{part}/weight", np.ascontiguousarray(self._of(part).T))
        y = insert(graph, "MatMul", [x, weight], f"{name}/{part}/product", dtype=np.float32)
        bias = constant(f"{name}/{part}/bias", self._weights[f"{part}.bias"])
        return insert(graph, "Add", [y, bias], f"{name}/{part}", dtype=np.float32)

    def _of(self, part: str) -> np.ndarray:
        return self._weights[f"{part}.weight"]


_AGAIN = "train this model again with `trimtab train --method magic-pyramid`"
