"""The pass `unpad`: from its first layer to its last, an encoder computes only real tokens, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.anatomy import Attention, find_anatomy
from trimtab.passes.contract import Capability, Left, Pass, PassContext, PassResult
from trimtab.passes.graph import output_name_of, rename_output, replace_uses, topological, values
from trimtab.passes.graph.opset import raise_opset
from trimtab.passes.unpad.core import Core, RefusedError, find_core
from trimtab.passes.unpad.inputs import mask_of
from trimtab.passes.unpad.joined import join_projections
from trimtab.passes.unpad.packing import Packing
from trimtab.passes.unpad.pooled import find_pooled
from trimtab.passes.unpad.tokens import Change, pack_node
from trimtab.plugins import PACKED_ATTENTION, add_node

_OPSET = 18  # of the op's reference body
_MICROSOFT = "com.microsoft"
_FUSED = {"Attention", "MultiHeadAttention", "QAttention"}  # by ONNX Runtime's optimizer of transformers


class Unpad(Pass):
    """Pack the real tokens of a batch one behind the other, from the first layer to the last.

    The mask input of the attentions marks the real tokens. Nodes that compute each token by itself stay, attention
    becomes the op PackedAttention, and q, k and v become one product. Nodes behind the last layer read the stream
    padded again, with zeros, or only each sample's first token.
    Exact: for real tokens the graph computes the same, up to the rounding of float32. If another node mixes tokens,
    the model is left unchanged, and the report names the node and the reason.
    """

    name: ClassVar[str] = "unpad"
    summary: ClassVar[str] = "encoders compute only real tokens, packed without padding"
    reads_layers: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Rewrite the whole `graph`, or leave it unchanged."""
        anatomy = find_anatomy(graph)
        if not anatomy.attentions:
            return PassResult(self.name, 0, (Left("the model", "no attention is recognised"),))
        try:
            blocks = anatomy.blocks
            if not blocks or blocks[0].attention is None:
                raise RefusedError("the model", "its layers are not recognised")
            stream = blocks[0].x
            streams = list({id(tensor): tensor for block in blocks for tensor in (block.x, block.y)}.values())
            mask = _mask(graph, [a.out.x for a in anatomy.attentions if a.out is not None], streams)
            _check_mask(stream, mask)
            cores = [find_core(graph, attention, streams, mask) for attention in anatomy.attentions]
            plan = _Plan(graph, stream, cores, mask)
        except RefusedError as error:
            return PassResult(self.name, 0, (Left(error.where, error.why + _fused(anatomy.attentions)),))
        raise_opset(graph, _OPSET)
        plan.rewrite(Packing(graph, stream, mask))
        return PassResult(self.name, len(cores), (), {"mask": None if mask is None else mask.name})

    def bars(self, later: Pass) -> str | None:
        return "training does not support the op PackedAttention" if later.name == "recover" else None

    def unfit(self, capability: Capability) -> str | None:
        if capability.counted_sizes:
            return None
        return "it does not support tensors whose sizes are counted at run time"


def _fused(attentions: Sequence[Attention]) -> str:
    """The note for messages if another tool fused attention into one op, which hides bias and mask."""
    ops = {node.op for attention in attentions for node in attention.nodes if node.domain == _MICROSOFT}
    if not ops & _FUSED:
        return ""
    return f" (fused as com.microsoft.{min(ops & _FUSED)}: use the exported file, not an optimized one)"


def _mask(graph: gs.Graph, contexts: Sequence[gs.Tensor], streams: Sequence[gs.Tensor]) -> gs.Tensor | None:
    """The input that marks real tokens; None if attention reads all tokens.

    Raises:
        RefusedError: attention depends on something else than the stream and a mask.
    """
    masks = mask_of(graph, contexts, streams)
    if len(masks) > 1:
        raise RefusedError(
            "the model", f"attention depends on several inputs: {', '.join(sorted(t.name for t in masks))}"
        )
    if masks and (masks[0].shape is None or len(masks[0].shape) != 2 or not _is_mask(masks[0])):
        raise RefusedError(
            "the model", f"attention depends on the input {masks[0].name}, which is not a mask [batch, tokens]"
        )
    return masks[0] if masks else None


def _is_mask(tensor: gs.Tensor) -> bool:
    return np.dtype(tensor.dtype) in (np.bool_, np.int32, np.int64, np.float32)


def _check_mask(stream: gs.Tensor, mask: gs.Tensor | None) -> None:
    if stream.shape is None or len(stream.shape) != 3:
        raise RefusedError("the model", "its stream is not [batch, tokens, width]")
    if mask is not None and isinstance(stream.shape[1], int) and stream.shape[1] != mask.shape[1]:
        raise RefusedError("the model", f"its mask {mask.name} is for another number of tokens than its layers have")


class _Plan:
    """The tensors to pack, and the changes that each node needs. Creating the plan changes nothing.

    Raises:
        RefusedError: a node before an attention or another layer does not compute each token by itself.
    """

    def __init__(self, graph: gs.Graph, stream: gs.Tensor, cores: Sequence[Core], mask: gs.Tensor | None) -> None:
        self.graph, self.stream, self.cores = graph, stream, cores
        self.packed: dict[int, int] = {id(stream): 3}  # tensor id → number of axes before packing
        self.nodes: dict[int, list[Change]] = {}
        self._tensors: list[gs.Tensor] = [stream]
        pending, stopped = list(cores), {}
        for node in topological(graph):
            for core in [core for core in pending if all(id(source) in self.packed for source in core.sources)]:
                self._add(core.context, 3)
                pending.remove(core)
            if any(id(tensor) in self.packed for tensor in node.outputs) or not self._reads(node):
                continue
            reason, changes = pack_node(node, self.packed)
            if reason is not None:
                stopped[id(node)] = (node, reason)
                continue
            self.nodes[id(node)] = changes
            axes = max(self.packed[id(t)] for t in node.inputs if id(t) in self.packed)
            for tensor in node.outputs:
                self._add(tensor, axes)
        own = {id(node) for node in graph.nodes}
        if any(id(node) not in own for tensor in self._tensors for node in tensor.outputs):
            raise RefusedError("the model", "a branch or a loop reads the stream between two layers")
        if pending:
            raise RefusedError(*self._first_stop(stopped, pending[0]))
        states = [t for t in self._tensors if self.packed[id(t)] == 3 and self._leaves(t)]
        self.pooled = find_pooled(graph, states, mask, set(self.nodes))

    def _leaves(self, tensor: gs.Tensor) -> bool:
        """Whether nodes other than attention read `tensor` and do not compute each token by itself."""
        sources = {id(source) for core in self.cores for source in core.sources}
        return id(tensor) not in sources and any(id(node) not in self.nodes for node in tensor.outputs)

    def _add(self, tensor: gs.Tensor, axes: int) -> None:
        if not tensor.is_empty():
            self.packed[id(tensor)] = axes
            self._tensors.append(tensor)

    def _reads(self, node: gs.Node) -> bool:
        return any(id(tensor) in self.packed for tensor in node.inputs)

    def _first_stop(self, stopped: dict[int, tuple[gs.Node, str]], core: Core) -> tuple[str, str]:
        """The first node before an attention's projections that does not support packed tokens."""
        before: set[int] = set()
        stack = list(core.sources)
        while stack:
            tensor = stack.pop()
            for node in tensor.inputs if id(tensor) not in self.packed else ():
                if id(node) not in before:
                    before.add(id(node))
                    stack += node.inputs
        for number, (node, reason) in stopped.items():
            if number in before:
                return output_name_of(node), f"{node.op}: {reason}"
        return f"attention {core.attention.layer}", "its input does not come from the first layer's"

    def rewrite(self, packing: Packing) -> None:
        """Pack the stream, replace the attentions, and unpack tensors for all other readers."""
        graph = self.graph
        nodes = {id(node): node for node in graph.nodes}
        replaced: dict[int, gs.Tensor] = {id(self.stream): packing.pack(self.stream)}
        outside = [(t, [n for n in t.outputs if id(n) in nodes and id(n) not in self.nodes]) for t in self._tensors]
        padded = {id(output): output.shape for output in graph.outputs}
        for tensor in self._tensors:
            if tensor is not self.stream and tensor.shape is not None:
                tensor.shape = ["unpad.real", *tensor.shape[2:]]
        for core in self.cores:
            inputs: dict[str, gs.Tensor] = join_projections(graph, core, replaced)
            inputs["offsets"] = packing.offsets
            if core.bias is not None:
                inputs["bias"] = core.bias
            if core.scale is not None:
                inputs["scale"] = _scale(core)
            kv_heads = 0 if core.kv_heads == core.heads else core.kv_heads
            name = f"unpad/attention.{core.attention.layer}"
            replaced[id(core.context)] = add_node(
                graph, PACKED_ATTENTION, inputs, name, heads=core.heads, kv_heads=kv_heads
            )
        for number, changes in self.nodes.items():
            node = nodes[number]
            for change in changes:
                change()
            node.inputs = [replaced.get(id(t), t) for t in node.inputs]
        for pooled in self.pooled:
            tokens = replaced.get(id(pooled.tokens), pooled.tokens)
            direct = packing.pooled(tokens, pooled.kind)
            direct.shape = pooled.tensor.shape
            replace_uses(graph, pooled.tensor, direct)
        for tensor, readers in outside:
            if tensor is self.stream:
                continue
            packed = replaced.get(id(tensor), tensor)
            for node in readers:
                _read(node, tensor, packed, packing)
            if any(tensor is output for output in graph.outputs):
                output = packing.unpack(packed)
                rename_output(graph, tensor, output)
                output.shape = padded[id(tensor)]
        graph.cleanup(remove_unused_graph_inputs=False)
        graph.nodes = topological(graph)


def _scale(core: Core) -> gs.Constant:
    return gs.Constant(f"unpad/attention.{core.attention.layer}/scale", np.array(core.scale, np.float32))


def _read(node: gs.Node, tensor: gs.Tensor, packed: gs.Tensor, packing: Packing) -> None:
    """Let `node`, which mixes tokens, read `tensor` from its packed form `packed`."""
    if node.op == "Gather" and node.inputs[0] is tensor and node.attrs.get("axis", 0) == 1 and _is_zero(node.inputs[1]):
        node.inputs, node.attrs["axis"] = list(packing.first(packed)), 0
        return
    node.inputs = [packing.unpack(packed) if t is tensor else t for t in node.inputs]


def _is_zero(index: gs.Tensor) -> bool:
    return isinstance(index, gs.Constant) and not index.shape and int(values(index)) == 0
