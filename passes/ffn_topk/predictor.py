"""Cheap predictors of an FFN's activations: low-rank or quantized copies of its projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from scipy.linalg import cholesky, solve_triangular, svd

from trimtab.passes.anatomy import FFN, clone_activation
from trimtab.passes.ffn_topk.importance import pool
from trimtab.passes.graph import constant, insert
from trimtab.passes.matrices.forms import Matrix, Product
from trimtab.passes.matrices.in_range import in_range
from trimtab.passes.sampled_ffn import FFNWeights

_DAMP = 1e-3  # damping, relative to the mean variance of the inputs
_PROBES = 16  # oversampling of the subspace iteration: directions beyond the rank


@dataclass(frozen=True)
class Guess:
    """Cheap estimate of one projection's outputs: x Ŵ + b.

    Attributes:
        weight: Ŵ, an approximation of W_up or W_gate, [d_model, d_ff].
        bias: b, the projection's own bias, [d_ff], or None.
    """

    weight: Matrix
    bias: np.ndarray | None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ self.weight
        return y if self.bias is None else y + self.bias

    def store(self, name: str, uses: int) -> Product:
        """Create the constants, which `uses` products read."""
        product = self.weight.store(name, np.dtype(np.float32), uses)
        if self.bias is None:
            return product
        shift = constant(f"{name}.bias", self.bias.astype(np.float32))

        def shifted(graph: gs.Graph, x: gs.Tensor, at: str) -> gs.Variable:
            return insert(graph, "Add", [product(graph, x, at), shift], f"{at}/shift", dtype=np.float32)

        return shifted


class Predictor:
    """Scores of blocks from estimates of the activation's inputs.

    For a gated FFN, the gate alone may be estimated; typical sizes then replace the other projection.

    Args:
        guesses: estimates of (up,), (gate,) or (gate, up).
        typical: root mean square of W_up's outputs, [d_ff], if only the gate is estimated.
        norm: ‖v_j‖ of each neuron, [d_ff].
        common: blocks that are always taken.
    """

    def __init__(
        self, layer: FFNWeights, guesses: Sequence[Guess], norm: np.ndarray, block: int, *,
        typical: np.ndarray | None = None, common: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.layer, self.guesses, self.block, self.common = layer, tuple(guesses), block, common
        self.weight = norm if typical is None else norm * typical
        self.gate_alone = typical is not None

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a token reads."""
        return sum(guess.weight.nbytes for guess in self.guesses)

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Scores of states x [tokens, d_model], [tokens, blocks]."""
        pre = tuple(guess(x) for guess in self.guesses)
        if self.gate_alone:
            pre = (*pre, np.ones_like(pre[0]))
        scores = pool(np.abs(self.layer.act(pre)) * self.weight, self.block)
        if self.common is not None:
            scores[:, self.common] = np.inf
        return scores

    def store(self, name: str, uses: int, *, in_rows: bool = True) -> Callable[[gs.Graph, FFN, str], gs.Variable]:
        """Create the constants; returns a function that appends the nodes which compute the scores of an FFN.

        Args:
            name: prefix of the constants' names.
            uses: number of FFNs that use the constants.
            in_rows: scores of blocks of several neurons are [tokens, blocks]; else scores have the leading sizes of the
                FFN's input.
        """
        guesses = [guess.store(f"{name}/guess.{i}", uses) for i, guess in enumerate(self.guesses)]
        blocks = len(self.weight) // self.block
        one = constant(f"{name}/one", np.ones((), np.float32)) if self.gate_alone else None
        weight = constant(f"{name}/weight", self.weight.astype(np.float32))
        boost = np.zeros(blocks, np.float32)
        if self.common is not None:
            boost[self.common] = np.finfo(np.float32).max / 2
        always = constant(f"{name}/common", boost)

        def emit(graph: gs.Graph, ffn: FFN, at: str) -> gs.Variable:
            pre: list[gs.Tensor] = [guess(graph, ffn.x, f"{at}/guess.{i}") for i, guess in enumerate(guesses)]
            if one is not None:
                pre.append(one)
            act = clone_activation(graph, ffn.activation, pre, at)
            size = insert(graph, "Abs", [act], f"{at}/abs", dtype=np.float32)
            scores = insert(graph, "Mul", [size, weight], f"{at}/weighted", dtype=np.float32)
            if self.block > 1:
                rank = len(ffn.x.shape or ())
                leading = [-1] if in_rows or rank < 3 else [0] * (rank - 1)
                shape = constant(f"{at}/shape", np.array([*leading, blocks, self.block]))
                # ONNX Runtime 1.31 keeps axis -1 of an empty tensor
                axis = constant(f"{at}/axis", np.array([len(leading) + 1]))
                parts = insert(graph, "Reshape", [scores, shape], f"{at}/parts", dtype=np.float32)
                attrs: dict[str, object] = {"keepdims": 0}
                scores = insert(graph, "ReduceSum", [parts, axis], f"{at}/pool", attrs=attrs, dtype=np.float32)
            if self.common is not None:
                scores = insert(graph, "Add", [scores, always], f"{at}/always", dtype=np.float32)
            return scores

        return emit


@in_range()
def low_rank(
    weight: np.ndarray, x: np.ndarray, importance: np.ndarray, rank: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A [d, r] and B [r, n] with the least E‖(x W − x A B) diag(importance)‖² over the states x.

    Reduced-rank regression (Izenman 1975) of x W on x: with Cov x = L Lᵀ, the leading left singular vectors Q of
    Lᵀ W diag(importance) give A = L⁻ᵀ Q, B = Qᵀ Lᵀ W. They come from a subspace iteration (Halko et al. 2011,
    algorithm 4.4).

    Args:
        weight: W, [d, n].
        x: states, [tokens, d].
        importance: weight of each output, [n].
    """
    d = x.shape[1]
    moments = x.T @ x / len(x)
    moments[np.diag_indices(d)] += _DAMP * np.trace(moments) / d
    root = cholesky(moments, lower=True, check_finite=False)
    seen = root.T @ weight
    weighted = seen * importance
    rank = min(rank, d)
    wide = min(rank + _PROBES, d)
    span = np.linalg.qr(
        weighted @ np.random.default_rng(seed).standard_normal((weighted.shape[1], wide)).astype(np.float32)
    )[0]
    for _ in range(2):
        span = np.linalg.qr(weighted @ (weighted.T @ span))[0]
    q = span @ svd(span.T @ weighted, full_matrices=False, check_finite=False)[0][:, :rank]
    left = solve_triangular(root.T, q, lower=False, check_finite=False)
    return left.astype(np.float32), (q.T @ seen).astype(np.float32)
