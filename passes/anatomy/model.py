"""The parts of a transformer: views of the graph, with the tensors at their inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.passes.graph.linear import Linear


@dataclass(frozen=True)
class Activation:
    """The elementwise part of an FFN, between its up (and gate) projection and its down projection.

    Attributes:
        name: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "relu_squared", "sigmoid", "tanh", or "unknown".
            The nodes are evaluated to name it, so the name does not depend on how an exporter writes GELU.
        nodes: in topological order. All their constants are scalars, so they can be cloned for any width.
        inputs: (up.y,) without a gate, (gate.y, up.y) with one: hidden = name(gate.y) * up.y.
        output: the hidden tensor, [..., d_ff], which the down projection reads.
    """

    name: str
    nodes: tuple[gs.Node, ...]
    inputs: tuple[gs.Tensor, ...]
    output: gs.Tensor


@dataclass(frozen=True)
class FFN:
    """One feed-forward block: y = act(x W_up + b_up) W_down + b_down, or y = (act(x W_gate) * (x W_up)) W_down.

    Attributes:
        layer: the number of its layer, from 0. If an FFN of the model is in no layer, or layers have several or are
            parallel, all FFNs have their position among the FFNs instead.
        x: its input, [..., d_model].
        y: its output, before the residual is added, [..., d_model].
    """

    layer: int
    up: Linear
    gate: Linear | None
    down: Linear
    activation: Activation

    @property
    def x(self) -> gs.Tensor:
        return self.up.x

    @property
    def y(self) -> gs.Tensor:
        return self.down.y

    @property
    def hidden(self) -> gs.Tensor:
        """The activations of its neurons, [..., d_ff]."""
        return self.activation.output

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def d_model(self) -> int:
        return self.up.in_features

    @property
    def d_ff(self) -> int:
        return self.up.out_features

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its projections: (up, down), or (gate, up, down)."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears)

    @property
    def bytes(self) -> int:
        """Bytes of its weights and biases, as they are stored."""
        return sum(linear.bytes for linear in self.linears)

    @property
    def where(self) -> str:
        """Its name in messages."""
        return f"layer {self.layer} FFN"


@dataclass(frozen=True)
class Attention:
    """One self-attention block.

    Attributes:
        layer: position among the attention blocks, from 0.
        q, k, v: the projections; all three are the same Linear where the model has one packed QKV projection.
        out: the output projection, or None where it was not found.
        heads, kv_heads, head_dim: None where no shape or attribute shows them.
        nodes: the nodes between the projections, in topological order.
        probabilities: the attention weights, [batch, heads, queries, keys] (or [batch · heads, queries, keys], as some
            exporters write it): softmax rows, zero where a mask excludes a token. None in a fused op.
        fused: the name of the op if one op computes the block (Attention, MultiHeadAttention, GroupQueryAttention).
    """

    layer: int
    q: Linear | None
    k: Linear | None
    v: Linear | None
    out: Linear | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    nodes: tuple[gs.Node, ...]
    probabilities: gs.Tensor | None
    fused: str | None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its distinct projections."""
        distinct: list[Linear] = []
        for linear in (self.q, self.k, self.v, self.out):
            if linear is not None and all(linear.nodes[-1] is not other.nodes[-1] for other in distinct):
                distinct.append(linear)
        return tuple(distinct)

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears)


@dataclass(frozen=True)
class Block:
    """One layer: the residual stream from x to y, with the branches that are added to it.

    Pre-norm layers compute m = x + attention(norm(x)) and y = m + FFN(norm(m)), post-norm layers
    m = norm(x + attention(x)) and y = norm(m + FFN(m)), parallel ones y = x + attention(norm(x)) + FFN(norm'(x)).

    Attributes:
        layer: position among the layers, from 0, in the order of computation.
        x: the stream that enters the layer, [batch, tokens, d_model], before its first norm in pre-norm models.
        middle: m, the stream between attention and FFN; None where both read x, or the layer has only one of them.
        y: the stream that leaves the layer, which is the next layer's x. After the last layer of a pre-norm model it is
            the sum before the final norm, where the graph has that sum (a skip norm may compute both in one).
        attention: None where the layer has only an FFN.
        ffn: None where none is recognised, such as after a pass has rewritten it.
        norms: its norms, in the order of computation; each is a node of `Anatomy.norms`.
        nodes: ids of its branches' nodes, from the stream to the additions; without masks and positions.
    """

    layer: int
    x: gs.Tensor
    middle: gs.Tensor | None
    y: gs.Tensor
    attention: Attention | None
    ffn: FFN | None
    norms: tuple[gs.Node, ...]
    nodes: frozenset[int]


@dataclass(frozen=True)
class Embedding:
    """An embedding table [rows, width], and the node that looks up rows in it."""

    table: gs.Constant
    node: gs.Node

    @property
    def params(self) -> int:
        return int(self.table.shape[0]) * int(self.table.shape[1])


@dataclass(frozen=True)
class Head:
    """The last projections, after the last block, to classes or vocabulary.

    Attributes:
        linears: in order of computation; a classifier may have two (pooler, classifier).
        table: the embedding table that is also the last projection's weight, or None.
    """

    linears: tuple[Linear, ...]
    table: gs.Constant | None

    @property
    def tied(self) -> bool:
        return self.table is not None

    @property
    def vocabulary(self) -> Linear | None:
        """The last projection, if it has more outputs than inputs (a vocabulary, not classes)."""
        last = self.linears[-1]
        return last if last.out_features > last.in_features else None

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears)


@dataclass(frozen=True)
class Unrecognized:
    """Nodes that resemble a part but did not match: what they resemble, at which node, and why matching stopped."""

    what: str
    where: str
    why: str


@dataclass(frozen=True)
class Anatomy:
    """The parts of the whole model. `family` is a guess for display only; nothing depends on it."""

    family: str
    ffns: tuple[FFN, ...]
    attentions: tuple[Attention, ...]
    blocks: tuple[Block, ...]
    norms: tuple[gs.Node, ...]
    embeddings: tuple[Embedding, ...]
    head: Head | None
    params: int
    unrecognized: tuple[Unrecognized, ...]

    @property
    def layers(self) -> int:
        return max(len(self.ffns), len(self.attentions))

    @property
    def fixed_tokens(self) -> int | None:
        """Tokens per sample, where the graph fixes their number, as for the patches of an image; None elsewhere."""
        sizes = {ffn.x.shape[1] for ffn in self.ffns if ffn.x.shape is not None and len(ffn.x.shape) == 3}
        return max((size for size in sizes if isinstance(size, int)), default=None)
