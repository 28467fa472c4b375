"""Quality over what is computed: a model at several settings, beside its dense self on the same texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from routing.counted import Counted, Totals, at_dials
from routing.curves import Curve
from trimtab.compiler.builds.build import Build

Dials = Callable[[int], Mapping[str, np.ndarray]]
"""Dials as inputs of a call of so many samples."""


class Judge(ABC):
    """Judges compiled models: on all texts at their default setting, on a part of them where a dial is moved.

    Args:
        dense: ONNX file of the dense model, whose FFNs are all that differs.
    """

    score: ClassVar[str]
    """What `answer` returns."""

    def __init__(self, dense: Path) -> None:
        self.dense_onnx = dense
        self._dense: dict[bool, tuple[float, Totals]] = {}

    @abstractmethod
    def answer(self, counted: Counted, dials: Dials, *, part: bool) -> float:
        """The score of a model on all texts, or on a part of them; counts what that takes, from 0 on."""

    @abstractmethod
    def build(self, passes: list[Any], *, routed: bool) -> Build:
        """A build of the model with routers, or of the dense one."""

    @abstractmethod
    def beside(self, score: float, dense: float) -> float:
        """How far a score is from that of the dense model."""

    @abstractmethod
    def dense(self) -> Counted:
        """The dense model, as it is compared with."""

    def of_dense(self, *, part: bool = False) -> tuple[float, Totals]:
        """Score and cost of the dense model."""
        if part not in self._dense:
            counted = self.dense()
            self._dense |= {some: (self.answer(counted, no_dials, part=some), counted.totals) for some in (False, True)}
        return self._dense[part]

    def curve(self, curve: Curve, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Points of a curve: a build for each setting of its passes, and of each build some values of its dial.

        Args:
            asked: settings of the training, sparsity and group among them.
        """
        points = []
        for passes, values in curve.builds(asked["sparsity"], asked["group"]):
            build = self.build(passes, routed=curve.routed)
            counted = Counted(build.model, self.dense_onnx)
            rows = next(each.details["layers"] for each in build.manifest.passes if each.name.startswith("ffn-"))
            for dials in curve.settings(build.manifest.dials, values):
                default = dials == {dial.name: dial.default for dial in build.manifest.dials}
                value, totals = self.of_dense(part=not default)
                score = self.answer(counted, partial(at_dials, build.manifest, dials=dials), part=not default)
                point = {"dials": dials, "default": default, self.score: score, "beside": self.beside(score, value)}
                points.append(point | counted.spent(totals, rows))
        return points


def no_dials(batch: int) -> dict[str, np.ndarray]:
    """Of a model without any."""
    return {}
