"""Routers of a Profile: of each FFN a linear layer that scores its groups of neurons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import constant, insert

METHOD = "lte"
_HINT = "compile the model that they were trained with; `trimtab train --method lte` writes both into one folder"


@dataclass(frozen=True)
class Router:
    """G(x) = sigmoid(x Wᵀ + b) of the groups of one FFN.

    Attributes:
        weight: W, [groups, d_model], float32; bias: b, [groups].
    """

    weight: np.ndarray
    bias: np.ndarray

    @property
    def groups(self) -> int:
        return len(self.bias)

    def share(self, cap: float) -> int:
        """How many groups the share `cap` of them is, at least one."""
        return max(1, round(cap * self.groups))

    @property
    def nbytes(self) -> int:
        return int(self.weight.nbytes + self.bias.nbytes)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """[tokens, groups] of states x [tokens, d_model]."""
        with np.errstate(over="ignore"):
            found: np.ndarray = 1 / (1 + np.exp(-(x @ self.weight.T + self.bias)))
        return found

    def emit(self, graph: gs.Graph, x: gs.Tensor, at: str) -> gs.Variable:
        """Append the nodes that compute the scores, [..., groups]."""
        weight = constant(f"{at}/router.weight", self.weight.T)
        bias = constant(f"{at}/router.bias", self.bias)
        product = insert(graph, "MatMul", [x, weight], f"{at}/router/product", dtype=np.float32)
        logits = insert(graph, "Add", [product, bias], f"{at}/router/logits", dtype=np.float32)
        scores = insert(graph, "Sigmoid", [logits], f"{at}/router/scores", dtype=np.float32)
        if x.shape is not None:
            product.shape = logits.shape = scores.shape = [*x.shape[:-1], self.groups]
        return scores


@dataclass(frozen=True)
class Routers:
    """What training has learned.

    Attributes:
        by_layer: number of an FFN → its router.
        threshold: score at which a group is computed; None where `cumulative` chooses.
        cumulative: share of the sum of all scores up to which the best groups are computed; None likewise.
    """

    by_layer: dict[int, Router]
    threshold: float | None
    cumulative: float | None

    @classmethod
    def of(cls, learned: Mapping[str, np.ndarray]) -> Routers:
        """Out of the tensors of a Profile.

        Raises:
            ProfileError: they are not what the training writes.
        """
        found: dict[int, Router] = {}
        for name, weight in learned.items():
            match = re.fullmatch(r"router\.(\d+)\.weight", name)
            if match is None:
                continue
            bias = learned.get(f"router.{match[1]}.bias")
            if weight.ndim != 2 or bias is None or bias.shape != weight.shape[:1]:
                raise ProfileError(f"the router of FFN {match[1]} in the profile is damaged", hint=_HINT)
            found[int(match[1])] = Router(weight.astype(np.float32), bias.astype(np.float32))
        cuts = [
            None if name not in learned else float(np.reshape(learned[name], -1)[0])
            for name in ("threshold", "cumulative")
        ]
        if found and (cuts[0] is None) == (cuts[1] is None):
            raise ProfileError("the profile has routers, and not one of threshold and cumulative", hint=_HINT)
        return cls(dict(sorted(found.items())), *cuts)

    @property
    def default(self) -> float:
        """Of the dial: the threshold, or what the share leaves of 1."""
        return self.threshold if self.threshold is not None else 1 - (self.cumulative or 0.0)

    def check(self, ffns: Mapping[int, FFN]) -> None:
        """Refuse routers of another model.

        Args:
            ffns: those of the model, by number.

        Raises:
            ProfileError: says which does not fit, and why.
        """
        for layer, router in self.by_layer.items():
            if layer not in ffns:
                raise ProfileError(
                    f"the profile has a router of FFN {layer}, and the model has {len(ffns)} FFNs", hint=_HINT
                )
            ffn = ffns[layer]
            if router.weight.shape[1] != ffn.d_model:
                raise ProfileError(
                    f"{ffn.where}: its router reads {router.weight.shape[1]} features, and the FFN {ffn.d_model}",
                    hint=_HINT,
                )
            if ffn.d_ff % router.groups:
                raise ProfileError(
                    f"{ffn.where}: its router has {router.groups} groups, which do not divide its {ffn.d_ff} neurons",
                    hint=_HINT,
                )

    def chosen(self, scores: np.ndarray, cut: float, most: int | None = None) -> np.ndarray:
        """Which groups are computed, bool, of scores [tokens, groups].

        Args:
            cut: value of the dial.
            most: groups of one token, the best; no bound, if not given.
        """
        order = np.argsort(-scores, axis=1, kind="stable")
        ordered = np.take_along_axis(scores, order, 1)
        reached = ordered
        if self.threshold is None:
            left = np.cumsum(ordered[:, ::-1], 1)[:, ::-1]
            reached = left / left[:, :1]
        taken = reached >= cut
        taken[:, 0] = True
        if most is not None:
            taken[:, most:] = False
        found = np.zeros_like(taken)
        np.put_along_axis(found, order, taken, 1)
        return found
