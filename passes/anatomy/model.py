"""The parts of a transformer as passes see them: views on the graph, with the tensors at their borders."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from trimtab.passes.graph.linear import Linear


@dataclass(frozen=True)
class Activation:
    """The elementwise part of an FFN, between its up (and gate) projection and its down projection.

    Attributes:
        name: "gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "relu_squared", "sigmoid", "tanh", or "unknown".
            Found by evaluating the nodes, so that every exporter's way to write GELU is the same GELU.
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
        layer: number of its layer, from 0; its position among the FFNs where they are not in layers of their own.
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
        """Of its weights and biases, as they are stored."""
        return sum(linear.bytes for linear in self.linears)

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"layer {self.layer} FFN"


@dataclass(frozen=True)
class Attention:
    """One self-attention block.

    Attributes:
        layer: position among the attention blocks, from 0.
        q, k, v: the projections; all three are the same Linear where the model has one packed QKV projection.
        out: the output projection, or None where it was not found.
        heads, kv_heads, head_dim: None where shapes do not tell.
        nodes: those between the projections, in topological order.
        probabilities: what weighs the values, [batch, heads, queries, keys] (or [batch · heads, queries, keys], as some
            exporters write it): rows of the softmax, zeros where a mask excludes. None where one op fuses them.
        fused: the name of the op if one op computes it (Attention, MultiHeadAttention, GroupQueryAttention).
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
        """Its projections, each once."""
        found: list[Linear] = []
        for linear in (self.q, self.k, self.v, self.out):
            if linear is not None and all(linear.nodes[-1] is not other.nodes[-1] for other in found):
                found.append(linear)
        return tuple(found)

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears)


@dataclass(frozen=True)
class Block:
    """One layer: the residual stream from x to y, with what is added to it.

    Pre-norm layers compute m = x + attention(norm(x)) and y = m + FFN(norm(m)), post-norm layers
    m = norm(x + attention(x)) and y = norm(m + FFN(m)), parallel ones y = x + attention(norm(x)) + FFN(norm'(x)).

    Attributes:
        layer: position among the layers, from 0, in the order of computation.
        x: the stream that enters it, [batch, tokens, d_model], before its first norm where it has pre-norms.
        middle: m, the stream between attention and FFN; None where both read x, or the layer has one of them alone.
        y: the stream that leaves it, which is the next layer's x. Behind the last layer of a pre-norm model it is the
            sum before the final norm, where the graph has that sum (a skip norm may compute both in one).
        attention: None where an FFN comes without one.
        ffn: None where it was not recognised, such as behind a pass that has rewritten it.
        norms: those within it, in the order of computation; of each the node that `Anatomy.norms` has.
        nodes: ids of the nodes of its branches, from the stream to what is added to it; without masks and positions.
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
    """A table looked up by integers: [rows, width]."""

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
        table: the embedding table that is the last one's weight too, or None.
    """

    linears: tuple[Linear, ...]
    table: gs.Constant | None

    @property
    def tied(self) -> bool:
        return self.table is not None

    @property
    def vocabulary(self) -> Linear | None:
        """The last projection, if it has more outputs than inputs, as to a vocabulary and not to classes."""
        last = self.linears[-1]
        return last if last.out_features > last.in_features else None

    @property
    def params(self) -> int:
        return sum(linear.params for linear in self.linears)


@dataclass(frozen=True)
class Unrecognized:
    """Something that looked like a part and was not understood: what, at which node, and why matching stopped."""

    what: str
    where: str
    why: str


@dataclass(frozen=True)
class Anatomy:
    """The whole model. `family` is a guess for display alone; nothing depends on it."""

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
        """Tokens of each sample, where the graph leaves no choice, as for the patches of an image; None elsewhere."""
        sizes = {ffn.x.shape[1] for ffn in self.ffns if ffn.x.shape is not None and len(ffn.x.shape) == 3}
        return max((size for size in sizes if isinstance(size, int)), default=None)
