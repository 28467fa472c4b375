"""A batch with packed tokens, [T, ...]: the rows of the samples follow each other without padding.

`offsets` [batch + 1], int32, contains the start of each sample: sample b has the rows offsets[b] to offsets[b + 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.cut import reads
from trimtab.passes.graph.edit import insert, output_name_of
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.shapes import token_outputs
from trimtab.plugins import PACKED_ATTENTION

_OFFSETS, _BIAS = (
    [parameter.name for parameter in PACKED_ATTENTION.inputs].index(name) for name in ("offsets", "bias")
)


class _Result(Protocol):
    """The result of a pass (`PassResult`)."""

    @property
    def name(self) -> str: ...

    @property
    def left(self) -> Sequence[_Left]: ...


class _Left(Protocol):
    @property
    def where(self) -> str: ...

    @property
    def why(self) -> str: ...


def offsets_of(attention: gs.Node) -> gs.Tensor:
    """The offsets of the samples in `attention`."""
    offsets: gs.Tensor = attention.inputs[_OFFSETS]
    return offsets


def bias_of(attention: gs.Node) -> gs.Tensor | None:
    """The bias of `attention` by position, the same for all samples; None without one."""
    bias: gs.Tensor = attention.inputs[_BIAS]
    return None if bias.is_empty() else bias


def packed_attentions(graph: gs.Graph, name: str, earlier: Iterable[_Result] = ()) -> list[gs.Node]:
    """The attentions of `graph`, from the first layer to the last.

    Args:
        name: the name of the pass that needs packed tokens.
        earlier: the results of the passes before it.

    Raises:
        ModelError: the tokens are not packed.
    """
    attentions = [node for node in topological(graph) if node.op == PACKED_ATTENTION.name]
    if attentions:
        return attentions
    refused = [left for result in earlier if result.name == "unpad" for left in result.left]
    if refused:
        raise ModelError(
            f"{name} needs packed tokens, and unpad leaves this model as it is: {refused[0].where}: {refused[0].why}",
            hint=f"remove {name} from the recipe",
        )
    raise ModelError(f"{name} needs packed tokens", hint=f"put the pass unpad in front of {name}")


def rows_of(graph: gs.Graph, x: gs.Tensor, rows: gs.Tensor, name: str) -> gs.Variable:
    """Rows `rows` of `x`, in the type of `x`."""
    y = insert(graph, "Gather", [x, rows], name, attrs={"axis": 0}, dtype=x.dtype)
    if x.shape is not None:
        y.shape = [(rows.shape or [f"{name}.rows"])[0], *x.shape[1:]]
    return y


def readers_behind(graph: gs.Graph, x: gs.Tensor) -> list[gs.Node]:
    """The nodes that depend on `x`, in topological order."""
    reached, readers = {id(x)}, []
    for node in topological(graph):
        if any(id(tensor) in reached for tensor in reads(node)):
            readers.append(node)
            reached |= {id(tensor) for tensor in node.outputs}
    return readers


def strangers(graph: gs.Graph, nodes: list[gs.Node], own: Mapping[int, gs.Tensor], name: str) -> list[gs.Tensor]:
    """The distinct tensors that `nodes` read, except weights, their own outputs and `own`.

    Nodes that compute a tensor from `own` alone, such as the first row of each sample, are copied into `nodes`; the
    originals still compute it for all samples.

    Args:
        own: tensor id → tensor.
    """
    copies: dict[int, gs.Tensor] = {}
    computed = {id(tensor) for node in nodes for tensor in node.outputs}
    unresolved: dict[int, gs.Tensor] = {}

    def own_copy(tensor: gs.Tensor) -> gs.Tensor | None:
        """`tensor`, computed from `own` by copied nodes; None if it also needs other tensors."""
        if isinstance(tensor, gs.Constant) or not tensor.name or id(tensor) in own:
            return tensor
        if id(tensor) not in copies:
            if len(tensor.inputs) != 1:
                return None
            (node,) = tensor.inputs
            inputs = [own_copy(read) for read in node.inputs]
            if any(read is None for read in inputs) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
                return None
            outputs = [gs.Variable(f"{t.name}/{name}", t.dtype, t.shape) for t in node.outputs]
            graph.nodes.append(
                gs.Node(node.op, f"{node.name}/{name}", dict(node.attrs), inputs, outputs, domain=node.domain)
            )
            nodes.append(graph.nodes[-1])
            copies.update({id(old): new for old, new in zip(node.outputs, outputs, strict=True)})
        return copies[id(tensor)]

    for node in list(nodes):
        for tensor in reads(node):
            if id(tensor) in computed or id(tensor) in own:
                continue
            copied = own_copy(tensor)
            if copied is None:
                unresolved[id(tensor)] = tensor
            else:
                reread([node], {id(tensor): copied})
    return list(unresolved.values())


def reread(nodes: Sequence[gs.Node], instead: Mapping[int, gs.Tensor]) -> None:
    """Replace inputs of `nodes` as in `instead` (id of the old tensor → new tensor)."""
    for node in nodes:
        node.inputs = [instead.get(id(tensor), tensor) for tensor in node.inputs]


def why_all(graph: gs.Graph, nodes: Sequence[gs.Node], stranger: gs.Tensor) -> str:
    """Why `nodes` need all tokens of all samples: the reason is `stranger`, a tensor of the whole batch they read."""
    if any(node.op == PACKED_ATTENTION.name and bias_of(node) is stranger for node in nodes):
        return "later attentions have a bias by position, and the tokens that remain have no positions of their own"
    computed = {id(tensor) for node in nodes for tensor in node.outputs}
    by_token = set(token_outputs(graph))
    if names := [tensor.name for tensor in graph.outputs if tensor.name in by_token and id(tensor) in computed]:
        return f"the output {names[0]!r} has a row for each token"
    return f"{_mixing(nodes, stranger)} reads all tokens at their positions"


def _mixing(nodes: Sequence[gs.Node], stranger: gs.Tensor) -> str:
    """The first of the model's own nodes that reads the unpacked tokens in `stranger`."""
    reached, first = {id(stranger)}, stranger.name
    for node in nodes:
        if any(id(tensor) in reached for tensor in reads(node)):
            first = output_name_of(node)
            if not first.startswith("unpad/"):
                break
            reached |= {id(tensor) for tensor in node.outputs}
    return f"the node {first}"
