"""Routers that estimate the neurons' contributions with int4 copies of the projections before the activation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import FFN
from trimtab.passes.contract import Capability
from trimtab.passes.errors import ProfileError
from trimtab.passes.ffn_route.router import HINT, Router
from trimtab.passes.ffn_topk.predictor import Guess, Predictor
from trimtab.passes.graph import constant, insert
from trimtab.passes.matrices.forms import OPSETS
from trimtab.passes.matrices.quantize import fit_block, in_form
from trimtab.passes.sampled_ffn import FFNWeights

FORM, BITS, BLOCK = "int4", 4, 64
"""Form, bits and block of the copies. They are rounded to nearest, with one scale per block of a neuron's inputs."""


@dataclass(frozen=True)
class CopyRouter(Router):
    """G(x) = s / (1 + s), s = Σ size_j |ĥ_j| over the neurons of a group.

    ĥ are the activations computed with int4 copies of W_up, and of W_gate if there is one. In a gated FFN no linear
    function of x predicts |silu(x W_gate) · x W_up|; copies in an eighth of the bytes do (HiRE, arXiv 2402.09360, uses
    such a predictor too). Training learns how large a contribution has to be.
    ONNX Runtime rounds the inputs of such products to bytes. This changes only decisions close to the threshold.

    Attributes:
        sizes: size_j, [groups, neurons of a group], float32. A neuron alone gives its group a score of 0.5 if
            |ĥ_j| = 1 / size_j.
        ffn: the FFN whose weights are copied; None until the router is bound to an FFN.
    """

    sizes: np.ndarray
    ffn: FFN | None = None

    @property
    def opset(self) -> int:
        return OPSETS[FORM]

    @property
    def groups(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return self._predictor.nbytes + int(self.sizes.nbytes)

    @property
    def macs(self) -> int:
        return sum(guess.weight.macs for guess in self._predictor.guesses)

    def scores(self, x: np.ndarray) -> np.ndarray:
        added = self._predictor.scores(x)
        scores: np.ndarray = added / (1 + added)
        return scores

    def emit(self, graph: gs.Graph, ffn: FFN, at: str) -> gs.Variable:
        added = self._predictor.store(f"{at}/router", 1, in_rows=False)(graph, ffn, f"{at}/router")
        one = constant(f"{at}/router/unit", np.ones((), np.float32))
        more = insert(graph, "Add", [added, one], f"{at}/router/more", dtype=np.float32)
        scores = insert(graph, "Div", [added, more], f"{at}/router/scores", dtype=np.float32)
        if ffn.x.shape is not None:
            scores.shape = [*ffn.x.shape[:-1], self.groups]
        return scores

    def bound(self, ffn: FFN) -> CopyRouter:
        if self.sizes.size != ffn.d_ff:
            raise ProfileError(
                f"{ffn.where}: its router knows {self.sizes.size} neurons, and the FFN has {ffn.d_ff}", hint=HINT
            )
        return CopyRouter(self.sizes, ffn)

    def unfit(self, ffn: FFN, capability: Capability) -> str | None:
        return unfit_for_copies(ffn.d_model) or (
            None if BITS in capability.weight_bits else f"the target does not multiply with {FORM} weights"
        )

    @cached_property
    def _predictor(self) -> Predictor:
        assert self.ffn is not None, "a bound router has an FFN"
        guesses = [
            Guess(in_form(linear.w().astype(np.float32), FORM, BLOCK), linear.b()) for linear in self.ffn.linears[:-1]
        ]
        return Predictor(FFNWeights(self.ffn), guesses, self.sizes.reshape(-1), self.sizes.shape[1])


def unfit_for_copies(d_model: int) -> str | None:
    """Why the weights of an FFN of this width cannot be copied in int4, or None."""
    if fit_block(BLOCK, d_model) is None:
        return f"it reads {d_model} features, which no block of {FORM} weights divides (16, 32 or 64)"
    return None
