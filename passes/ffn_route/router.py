"""Routers, which score the groups of one FFN's neurons. The linear router is the paper's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.contract import Capability
from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import constant, insert
from trimtab.passes.matrices.forms import OPSETS, Matrix
from trimtab.passes.matrices.quantize import fit_block, in_form

BITS = 8
"""Bits of the router's weights if the FFN's weights are integers."""
_BLOCK = 64
_LARGE = 1 << 20
"""Size in fp32, in bytes, from which on a router is stored as integers. Smaller ones stay in a core's cache."""

HINT = "compile the model that they were trained with; `trimtab train --method lte` writes both into one folder"


class Router(ABC):
    """Scores of the groups of one FFN's neurons, 0 to 1, from the FFN's input x."""

    @property
    def opset(self) -> int:
        """The lowest opset that the router's nodes need."""
        return 0

    @property
    @abstractmethod
    def groups(self) -> int:
        """Number of groups."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes read per token."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds per token."""

    @abstractmethod
    def scores(self, x: np.ndarray) -> np.ndarray:
        """Scores of states x [tokens, d_model], [tokens, groups]."""

    @abstractmethod
    def emit(self, graph: gs.Graph, ffn: FFN, at: str) -> gs.Variable:
        """Append the nodes that compute the scores, [..., groups]."""

    @abstractmethod
    def bound(self, ffn: FFN) -> Router:
        """The router bound to its FFN.

        Raises:
            ProfileError: the router belongs to another model.
        """

    def in_integers(self) -> Router:
        """The router for an FFN whose weights are integers."""
        return self

    def unfit(self, ffn: FFN, capability: Capability) -> str | None:
        """Why the FFN cannot use this router, or None."""
        return None

    def share(self, cap: float) -> int:
        """The number of groups in the share `cap`, at least one."""
        return max(1, round(cap * self.groups))


@dataclass(frozen=True)
class LinearRouter(Router):
    """G(x) = sigmoid(x Wᵀ + b), as in the paper.

    Attributes:
        weight: W, [groups, d_model], float32; bias: b, [groups].
        form: of W in the graph, fp32 or int8 in blocks.
    """

    weight: np.ndarray
    bias: np.ndarray
    form: Literal["fp32", "int8"] = "fp32"

    @property
    def opset(self) -> int:
        return OPSETS.get(self.form, 0)

    @property
    def groups(self) -> int:
        return len(self.bias)

    @property
    def nbytes(self) -> int:
        return int(self._matrix.nbytes + self.bias.nbytes)

    @property
    def macs(self) -> int:
        return int(self.weight.size)

    def in_integers(self) -> LinearRouter:
        """A large router in int8: next to int8 rows, its fp32 bytes weigh four times as much.

        A small router stays in fp32. ONNX Runtime also rounds the inputs of int8 products to bytes, and a rounded score
        can change which groups are computed.
        """
        fits = self.weight.nbytes >= _LARGE and fit_block(_BLOCK, self.weight.shape[1]) is not None
        return replace(self, form="int8") if fits else self

    @cached_property
    def _matrix(self) -> Matrix:
        return in_form(self.weight.T, self.form, _BLOCK, search=True)

    def scores(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            scores: np.ndarray = 1 / (1 + np.exp(-(x @ self._matrix + self.bias)))
        return scores

    def emit(self, graph: gs.Graph, ffn: FFN, at: str) -> gs.Variable:
        x = ffn.x
        bias = constant(f"{at}/router.bias", self.bias)
        product = self._matrix.store(f"{at}/router", np.dtype(np.float32))(graph, x, f"{at}/router/product")
        logits = insert(graph, "Add", [product, bias], f"{at}/router/logits", dtype=np.float32)
        scores = insert(graph, "Sigmoid", [logits], f"{at}/router/scores", dtype=np.float32)
        if x.shape is not None:
            product.shape = logits.shape = scores.shape = [*x.shape[:-1], self.groups]
        return scores

    def bound(self, ffn: FFN) -> LinearRouter:
        if self.weight.shape[1] != ffn.d_model:
            raise ProfileError(
                f"{ffn.where}: its router reads {self.weight.shape[1]} features, and the FFN {ffn.d_model}", hint=HINT
            )
        if ffn.d_ff % self.groups:
            raise ProfileError(
                f"{ffn.where}: its router has {self.groups} groups, which do not divide its {ffn.d_ff} neurons",
                hint=HINT,
            )
        return self
