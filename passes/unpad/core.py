"""Recognises what an attention computes between its projections, by running the nodes on random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import Attention
from trimtab.passes.graph.part import nodes_between, run_part
from trimtab.passes.unpad.inputs import feed, shape_of

__all__ = ["Core", "RefusedError", "find_core"]

_CLOSE = 1e-3  # relative tolerance: float32 rounding, and what an exporter's mask adds to real keys
_HIDES = 1e4  # size of numbers that mask a score; biases are smaller
_SEED = 0


class RefusedError(Exception):
    """The reason why a model is left unchanged."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(why)
        self.where, self.why = where, why


@dataclass(frozen=True)
class Core:
    """One attention that computes softmax(scale q kᵀ + bias) v over the real keys.

    Attributes:
        attention: the attention, whose `out.x` is the context, [batch, tokens, heads · dim].
        scale: None for 1 / √dim.
        bias: [.., 1 or heads, tokens, tokens] by position, or None.
    """

    attention: Attention
    heads: int
    kv_heads: int
    dim: int
    scale: float | None
    bias: gs.Tensor | None

    @property
    def sources(self) -> tuple[gs.Tensor, ...]:
        """The outputs of its projections: q, k and v, or one tensor with all three side by side."""
        return _sources(self.attention)

    @property
    def context(self) -> gs.Tensor:
        assert self.attention.out is not None
        return self.attention.out.x


def find_core(graph: gs.Graph, attention: Attention, streams: Sequence[gs.Tensor], mask: gs.Tensor | None) -> Core:
    """Measure the scale and bias of `attention`, and compare its output with attention in float64.

    Args:
        streams: the tensors of the residual stream between layers; the trial sets their values.
        mask: the graph's input that marks real tokens, [batch, tokens]; None if all tokens are real.

    Raises:
        RefusedError: the nodes compute something else.
    """
    where = f"attention {attention.layer}"
    if attention.q is None or attention.k is None or attention.v is None or attention.out is None:
        raise RefusedError(where, "one of its projections is not recognised")
    heads, kv_heads, dim = attention.heads, attention.kv_heads or attention.heads, attention.head_dim
    if not heads or not kv_heads or not dim or heads % kv_heads:
        raise RefusedError(where, "its heads are not recognised")
    sources, context = _sources(attention), attention.out.x
    widths = [heads * dim, kv_heads * dim, kv_heads * dim] if len(sources) == 3 else [(heads + 2 * kv_heads) * dim]
    if len(sources) == 2 or any(tensor.dtype not in (None, np.float32) for tensor in (*sources, context)):
        raise RefusedError(where, "its q, k and v are not float32 tensors of their own")
    trial = _Trial(graph, attention, sources, widths, streams, mask)
    bias, scale = None, None
    softmax = next((node for node in attention.nodes if node.op == "Softmax"), None)
    if softmax is not None:
        scale, bias = trial.scale_and_bias(softmax, (heads, kv_heads, dim), where)
    elif "scale" in attention.nodes[-1].attrs:
        scale = float(attention.nodes[-1].attrs["scale"])
    core = Core(attention, heads, kv_heads, dim, scale, bias)
    expected = trial.attend(core)
    (computed,) = trial.run([context], trial.feeds)
    if computed.shape != expected.shape or not _close(computed[trial.real], expected[trial.real]):
        raise RefusedError(where, "it is not attention of every real token to all real tokens")
    if scale is not None and abs(scale * dim**0.5 - 1) < _CLOSE / 10:
        core = Core(attention, heads, kv_heads, dim, None, bias)
    return core


class _Trial:
    """Runs the nodes behind an attention's projections on random inputs."""

    def __init__(
        self,
        graph: gs.Graph,
        attention: Attention,
        sources: Sequence[gs.Tensor],
        widths: Sequence[int],
        streams: Sequence[gs.Tensor],
        mask: gs.Tensor | None,
    ) -> None:
        self.graph, self.attention, self.sources, self.mask = graph, attention, sources, mask
        rng = np.random.default_rng(_SEED)
        batch, tokens = shape_of(streams[0])
        self.real = np.ones((batch, tokens), bool)
        if mask is not None:
            self.real = rng.random((batch, tokens)) < 0.7
            self.real[:, 2] = True
        self.feeds = {
            source.name: rng.standard_normal((batch, tokens, width)).astype(np.float32)
            for source, width in zip(sources, widths, strict=True)
        }
        self._given = [*sources, *(x for x in streams if all(x is not source for source in sources))]
        for tensor in (*self._given[len(sources) :], *graph.inputs):
            self.feeds[tensor.name] = feed(tensor, batch, tokens, rng)
        if mask is not None:
            self.feeds[mask.name] = self.real.astype(mask.dtype)

    def run(self, outputs: Sequence[gs.Tensor], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return run_part(self.graph, self._given, outputs, feeds)

    def scale_and_bias(
        self, softmax: gs.Node, sizes: tuple[int, int, int], where: str
    ) -> tuple[float, gs.Tensor | None]:
        """Derive scale and bias from the scores for random q and for q = 0."""
        heads, kv_heads, dim = sizes
        scores = softmax.inputs[0]
        biases = [t for t in self._biases(scores, heads) if t is not scores]
        none = self.feeds | {self.sources[0].name: self.feeds[self.sources[0].name].copy()}
        none[self.sources[0].name][..., : heads * dim] = 0
        (full,) = self.run([scores], self.feeds)
        rest, *values = self.run([scores, *biases], none)
        q, k, _ = self._split(heads, kv_heads, dim)
        products = np.einsum("bqhd,bkhd->bhqk", q, k)
        shape = products.shape
        if full.size != products.size:
            raise RefusedError(where, "its scores are not [batch, heads, tokens, tokens]")
        real = np.broadcast_to(self.real[:, None, :, None] & self.real[:, None, None, :], shape)
        full, rest = (x.reshape(shape).astype(np.float64) for x in (full, rest))
        if not np.isfinite(rest[real]).all() or np.ptp(rest[real]) > _HIDES:
            raise RefusedError(where, "keys are hidden by position, as in a decoder")
        with np.errstate(invalid="ignore"):
            of_q = np.where(real, full - rest, 0)
        scale = float((of_q * products).sum() / np.where(real, products**2, 0).sum())
        if not _close(of_q[real], scale * products[real]):
            raise RefusedError(where, "its scores depend on more than q and k")
        if _constant(rest, real):
            return scale, None
        for tensor, value in zip(biases, values, strict=True):
            square = value.reshape(-1, *value.shape[-2:]).astype(np.float64)
            if _constant(rest - square, real) and (self.mask is None or _by_distance(square)):
                return scale, tensor
        raise RefusedError(where, "its scores have a bias, or a mask by position, that is not recognised")

    def _biases(self, scores: gs.Tensor, heads: int) -> list[gs.Tensor]:
        """Possible biases of the scores: floats by position that depend neither on q nor on the mask."""
        starts = [*self._given, *([self.mask] if self.mask is not None else [])]
        changing = _reached(starts)
        tokens = self.real.shape[1]
        nodes = [node for node in nodes_between(self._given, [scores]) if id(node) not in changing]
        candidates = [tensor for node in nodes for tensor in node.outputs if tensor.dtype is not None]
        biases = []
        for tensor, value in zip(candidates, self.run(candidates, self.feeds) if candidates else [], strict=True):
            lead = value.shape[:-2]
            of_heads = lead in ((), (1,), (heads,), (1, 1), (1, heads))
            if value.dtype == np.float32 and value.ndim >= 2 and value.shape[-2:] == (tokens, tokens) and of_heads:
                biases.append(tensor)
        return biases

    def _split(self, heads: int, kv_heads: int, dim: int) -> list[np.ndarray]:
        """q, k and v in float64, [batch, tokens, heads, dim]; k and v are repeated for the heads that share them."""
        parts = [self.feeds[source.name].astype(np.float64) for source in self.sources]
        if len(parts) == 1:
            parts = np.split(parts[0], np.cumsum([heads * dim, kv_heads * dim]), axis=-1)
        split = [part.reshape(*part.shape[:2], -1, dim) for part in parts]
        return [split[0], *(np.repeat(part, heads // kv_heads, axis=2) for part in split[1:])]

    def attend(self, core: Core) -> np.ndarray:
        """The context that `core` should compute, in float64."""
        q, k, v = self._split(core.heads, core.kv_heads, core.dim)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) * (core.dim**-0.5 if core.scale is None else core.scale)
        if core.bias is not None:
            (bias,) = self.run([core.bias], self.feeds)
            scores = scores + bias.reshape(-1, *bias.shape[-2:])
        scores = np.where(self.real[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        context = np.einsum("bhqk,bkhd->bqhd", weights, v)
        return np.asarray(context.reshape(*context.shape[:2], -1))


def _sources(attention: Attention) -> tuple[gs.Tensor, ...]:
    linears = [linear for linear in (attention.q, attention.k, attention.v) if linear is not None]
    return tuple({id(linear.y): linear.y for linear in linears}.values())


def _reached(tensors: Sequence[gs.Tensor]) -> set[int]:
    """Ids of the nodes whose values depend on the values (not only the sizes) of `tensors`."""
    nodes: set[int] = set()
    stack = list(tensors)
    while stack:
        for node in stack.pop().outputs:
            if id(node) not in nodes and node.op not in ("Shape", "Size"):
                nodes.add(id(node))
                stack += node.outputs
    return nodes


def _constant(scores: np.ndarray, real: np.ndarray) -> bool:
    """Whether all real keys of each real query have the same score, which softmax ignores."""
    low, high = np.where(real, scores, np.inf).min(axis=-1), np.where(real, scores, -np.inf).max(axis=-1)
    queries = real.any(axis=-1)
    return bool((high[queries] - low[queries]).max() < _CLOSE)


def _by_distance(square: np.ndarray) -> bool:
    """Whether a bias depends only on the distance of query and key, so that leading padding does not change it."""
    return bool(np.allclose(square[:, 1:, 1:], square[:, :-1, :-1], atol=_CLOSE))


def _close(computed: np.ndarray, expected: np.ndarray) -> bool:
    return bool(
        np.allclose(computed, expected, rtol=_CLOSE, atol=_CLOSE * max(1e-6, float(np.abs(expected).max(initial=0))))
    )
