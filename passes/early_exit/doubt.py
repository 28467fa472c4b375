"""How unsure a classifier is of each sample, 0 to 1: three criteria for leaving early."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.graph import constant, insert

Criterion = Literal["entropy", "probability", "patience"]


class Doubt:
    """Adds a criterion to a graph, exit by exit, without reducing ops.

    With reducing ops, ONNX Runtime 1.31 returns wrong shapes for 0 rows.

    entropy: entropy of the answer over that of a uniform answer (FastBERT, arXiv 2004.02178).
    probability: total probability of all classes but the likeliest.
    patience: 1 / n for n exits in a row, including this one, that chose the same class (PABEE, arXiv 2006.04152).

    Attributes:
        counts: state of `patience`, [batch, 1] each: number of exits in a row that chose the same class, and the class.
            The caller keeps the rows of the samples that stay.
    """

    def __init__(self, criterion: Criterion, classes: int) -> None:
        self._criterion, self._classes = criterion, classes
        self.counts: list[gs.Variable] = []

    def __call__(self, graph: gs.Graph, logits: gs.Tensor, name: str) -> gs.Variable:
        """Append the nodes that compute the doubt of `logits` [batch, classes]; returns it, [batch]."""

        def node(
            op: str, inputs: list[gs.Tensor], key: str, dtype: object = np.float32, **attrs: object
        ) -> gs.Variable:
            return insert(graph, op, inputs, f"{name}/{key}", attrs=attrs, dtype=dtype)

        def number(key: str, value: Any, dtype: Any = np.float32) -> gs.Constant:
            return constant(f"{name}/{key}", np.asarray(value, dtype))

        last = number("last", [1], np.int64)
        if self._criterion == "entropy":
            shares, logs = (node(op, [logits], op.lower(), axis=-1) for op in ("Softmax", "LogSoftmax"))
            weights = np.full((self._classes, 1), -1 / np.log(self._classes))
            summed = node("MatMul", [node("Mul", [shares, logs], "terms"), number("weights", weights)], "sum")
            return node("Squeeze", [summed, last], "doubt")
        if self._criterion == "probability":
            shares = node("Softmax", [logits], "softmax", axis=-1)
            best = _best(graph, shares, self._classes, f"{name}/best")[0]
            return node("Sub", [number("one", 1), node("Squeeze", [best, last], "likeliest")], "doubt")
        chosen = _best(graph, logits, self._classes, f"{name}/best")[1]
        one = number("one", 1)
        if self.counts:
            same = node("Cast", [node("Equal", [chosen, self.counts[1]], "equal", np.bool_)], "same", to=1)
            count = node("Add", [node("Mul", [self.counts[0], same], "more"), one], "count")
        else:
            count = node("Expand", [one, node("Shape", [chosen], "batch", np.int64)], "count")
        self.counts = [count, chosen]
        return node("Squeeze", [node("Div", [one, count], "share"), last], "doubt")


def _best(graph: gs.Graph, values: gs.Tensor, classes: int, name: str) -> tuple[gs.Variable, gs.Variable]:
    """The largest value of each row of `values` [batch, classes], and its index, [batch, 1] each.

    A row is appended and removed again, since TopK of zero rows ends the process in ONNX Runtime before 1.31.
    """
    row = constant(f"{name}/row", np.zeros((1, classes), np.float32))
    more = insert(graph, "Concat", [values, row], f"{name}/more", attrs={"axis": 0}, dtype=np.float32)
    outputs = [gs.Variable(f"{name}/value", np.float32), gs.Variable(f"{name}/place", np.int64)]
    k = constant(f"{name}/k", np.array([1], np.int64))
    insert(graph, "TopK", [more, k], name, attrs={"axis": -1}, outputs=outputs)
    ends = [constant(f"{name}/{key}", np.array([value], np.int64)) for key, value in (("first", 0), ("last", -1))]
    own = [insert(graph, "Slice", [t, *ends], f"{t.name}/own", dtype=t.dtype) for t in outputs]
    return own[0], own[1]
