"""The thresholds of all FFNs as functions of a dial, the share of neurons that is left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.ffn_threshold.quantiles import STEPS
from trimtab.passes.graph import constant, insert


class Levels:
    """Looks up the thresholds of FFNs for a dial. All FFNs share one table.

    Args:
        table: thresholds of each FFN for the shares 0 to 1 in equal steps, [FFNs, STEPS + 1].
        name: prefix of the nodes' names.
    """

    def __init__(self, graph: gs.Graph, table: Sequence[np.ndarray], name: str) -> None:
        self._graph, self._name = graph, name
        values = np.stack(table, -1).astype(np.float32)  # [STEPS + 1, FFNs]
        self._low = constant(f"{name}/thresholds", values[:-1])
        self._rise = constant(f"{name}/rises", np.diff(values, axis=0))
        self._levels: dict[int, tuple[gs.Tensor, gs.Variable]] = {}

    def at(self, dial: gs.Tensor, place: int, at: str) -> gs.Variable:
        """The threshold of FFN number `place` of the table, in the shape of `dial`, [..., 1]."""
        if id(dial) not in self._levels:
            self._levels[id(dial)] = dial, self._of_all(dial, f"{self._name}/of_tokens.{len(self._levels)}")
        index = constant(f"{at}/place", np.array([place]))
        return insert(
            self._graph, "Gather", [self._levels[id(dial)][1], index], f"{at}/threshold", attrs={"axis": -1},
            dtype=np.float32,
        )  # fmt: skip

    def _of_all(self, dial: gs.Tensor, name: str) -> gs.Variable:
        """Thresholds of all FFNs, [..., FFNs], interpolated between two steps."""
        last = self._axis(name)
        flat = self._node("Squeeze", [dial, last], f"{name}/flat")
        scaled = self._node("Mul", [flat, self._number("steps", STEPS)], f"{name}/scaled")
        floor = self._node("Floor", [scaled], f"{name}/floor")
        step = self._node("Min", [floor, self._number("last", STEPS - 1)], f"{name}/step")
        beyond = self._node("Sub", [scaled, step], f"{name}/beyond")
        number = insert(self._graph, "Cast", [step], f"{name}/number", attrs={"to": 7}, dtype=np.int64)
        low = self._node("Gather", [self._low, number], f"{name}/low")
        rise = self._node("Gather", [self._rise, number], f"{name}/rise")
        share = self._node("Unsqueeze", [beyond, last], f"{name}/share")
        more = self._node("Mul", [rise, share], f"{name}/more")
        return self._node("Add", [low, more], f"{name}/levels")

    def _number(self, key: str, value: float) -> gs.Constant:
        return constant(f"{self._name}/{key}", np.array(value, np.float32))

    def _axis(self, name: str) -> gs.Constant:
        return constant(f"{name}/axis", np.array([-1]))

    def _node(self, op: str, inputs: list[gs.Tensor], name: str) -> gs.Variable:
        return insert(self._graph, op, inputs, name, dtype=np.float32)
