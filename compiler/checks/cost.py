"""Counts what a model computes on given inputs: multiply-adds of its products, tokens and samples that go on.

A copy of the graph runs in ONNX Runtime with the sizes of its products as further outputs. So what depends on the data
is counted, not estimated: tokens that are removed, samples that leave, padding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.feeds import converted
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options, uses_dialect
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import insert, load_graph, output_name_of, save_graph
from trimtab.passes.graph.packed_batch import offsets_of
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins.sparse_up import SPARSE_UP

_PREFIX = "trimtab.cost"
_GATE, _BLOCKS = ([declared.name for declared in SPARSE_UP.inputs].index(name) for name in ("gate", "blocks"))
Sizes = Mapping[str, np.ndarray]


class Passage(BaseModel):
    """Rows that enter a node where some may leave, and rows that go on.

    Attributes:
        where: name of the node.
        what: "tokens" or "samples".
    """

    model_config = ConfigDict(frozen=True)

    where: str
    what: str
    entered: int
    stayed: int


class Cost(BaseModel):
    """The work of one run.

    Attributes:
        flops: FLOPs of products: 2 for each multiply-add. Norms, activations and sums do not count, as usual.
        passages: in the order of computation.
    """

    model_config = ConfigDict(frozen=True)

    flops: int
    passages: tuple[Passage, ...] = ()

    def __add__(self, other: Cost) -> Cost:
        """The cost of two runs of one model together."""
        summed = tuple(
            a.model_copy(update={"entered": a.entered + b.entered, "stayed": a.stayed + b.stayed})
            for a, b in zip(self.passages, other.passages, strict=True)
        )
        return Cost(flops=self.flops + other.flops, passages=summed)


class Counter:
    """Counts what a model computes.

    Args:
        model: an ONNX file.
        threads: CPU threads of one run; None for one per physical core.

    Attributes:
        inputs: names of the model's inputs, dials among them.

    Raises:
        ModelError: the model has a product that cannot be counted; names the node.
        TargetError: the model uses the dialect of another version of trimtab.
    """

    def __init__(self, model: Path, threads: int | None = None) -> None:
        uses_dialect(model)  # refuse another version's dialect here: the message names this file, not the copy
        graph = load_graph(model)
        self.inputs = [tensor.name for tensor in graph.inputs]
        self._inputs = [TensorInfo.of(tensor) for tensor in graph.inputs]
        self._outputs = [tensor.name for tensor in graph.outputs]
        sizes = _Sizes(graph)
        self._products = [count for node in list(graph.nodes) if (count := _product(node, sizes)) is not None]
        self._passages = [p for node in list(graph.nodes) if (p := _passage(node, sizes)) is not None]
        stack = ExitStack()
        weakref.finalize(self, stack.close)  # the session maps the file
        copy = stack.enter_context(temporary_folder("cost")) / "model.onnx"
        save_graph(graph, copy)
        self._runner = OnnxRuntimeRunner(copy, session_options(threads))

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> Cost:
        """Run once on `feeds`, dials among them."""
        return self.run(feeds)[0]

    def run(self, feeds: Mapping[str, np.ndarray]) -> tuple[Cost, dict[str, np.ndarray]]:
        """Run once on `feeds`, dials among them; returns the cost and the model's outputs."""
        sizes = self._runner.run(converted(feeds, self._inputs))
        cost = Cost(
            flops=sum(count(sizes) for count in self._products),
            passages=tuple(
                Passage(where=where, what=what, entered=int(entered(sizes)), stayed=int(stayed(sizes)))
                for where, what, entered, stayed in self._passages
            ),
        )
        return cost, {name: sizes[name] for name in self._outputs}


Count = Callable[[Sizes], int]


class _Sizes:
    """Adds the sizes of tensors to the outputs of the graph, each once."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._names: dict[int, str] = {}

    def shape(self, tensor: gs.Tensor) -> Callable[[Sizes], list[int]]:
        """A function that reads the shape of `tensor` from the outputs of a run."""
        if isinstance(tensor, gs.Constant):
            fixed = [int(size) for size in tensor.shape]
            return lambda sizes: fixed
        if id(tensor) not in self._names:
            name = self._names[id(tensor)] = f"{_PREFIX}/{len(self._names)}"
            output = insert(self._graph, "Shape", [tensor], name, dtype=np.int64)
            output.shape = [None if tensor.shape is None else len(tensor.shape)]
            self._graph.outputs.append(output)
        key = self._names[id(tensor)]
        return lambda sizes: [int(size) for size in sizes[key]]

    def value(self, tensor: gs.Tensor) -> Callable[[Sizes], np.ndarray]:
        """A function that reads the values of a small tensor from the outputs of a run."""
        if all(tensor is not output for output in self._graph.outputs):
            self._graph.outputs.append(tensor)
        return lambda sizes: sizes[tensor.name]


def _passage(node: gs.Node, sizes: _Sizes) -> tuple[str, str, Count, Count] | None:
    what = {"KeepTokens": "tokens", "KeepSamples": "samples"}.get(node.op)
    if what is None:
        return None
    before, after = sizes.shape(node.inputs[0]), sizes.shape(node.outputs[0])
    return output_name_of(node), what, lambda s: before(s)[0], lambda s: after(s)[0]


def _product(node: gs.Node, sizes: _Sizes) -> Count | None:
    """A function that counts the FLOPs of a product, 2 for each multiply-add; None for a node that is no product."""
    if node.op in _UNKNOWN:
        raise ModelError(f"{output_name_of(node)}: the multiply-adds of {node.op} are not known")
    counter = _COUNTERS.get(node.op)
    return None if counter is None else counter(node, sizes)


def _matmul(node: gs.Node, sizes: _Sizes) -> Count:
    a, b = (sizes.shape(node.inputs[place]) for place in ((0, 3) if node.op == "QLinearMatMul" else (0, 1)))
    transposed = bool(node.attrs.get("transB", 0))

    def count(s: Sizes) -> int:
        left, right = a(s), b(s)
        columns = right[-2 if transposed else -1] if len(right) > 1 else 1
        batch = np.broadcast_shapes(tuple(left[:-2]), tuple(right[:-2]))
        return 2 * _elements(batch) * _elements(left[-2:]) * columns

    return count


def _gemm(node: gs.Node, sizes: _Sizes) -> Count:
    a, b = (sizes.shape(tensor) for tensor in node.inputs[:2])
    columns = 0 if node.attrs.get("transB", 0) else 1
    return lambda s: 2 * _elements(a(s)) * b(s)[columns]


def _conv(node: gs.Node, sizes: _Sizes) -> Count:
    """Each element of the output is a product with one filter, [channels / group, ...]."""
    y, filters = sizes.shape(node.outputs[0]), sizes.shape(node.inputs[1])
    return lambda s: 2 * _elements(y(s)) * _elements(filters(s)[1:])


def _blocks(node: gs.Node, sizes: _Sizes) -> Count:
    x = sizes.shape(node.inputs[0])
    return lambda s: 2 * _elements(x(s)) * int(node.attrs["N"])


def _int4(node: gs.Node, sizes: _Sizes) -> Count:
    x, y = sizes.shape(node.inputs[0]), sizes.shape(node.outputs[0])
    return lambda s: 2 * _elements(y(s)) * x(s)[-1]


def _attention(node: gs.Node, sizes: _Sizes) -> Count:
    """Two products of n queries with n keys, for each sample of n tokens."""
    offsets, context = sizes.value(offsets_of(node)), sizes.shape(node.outputs[0])
    return lambda s: 4 * int(np.square(np.diff(offsets(s).astype(np.int64))).sum()) * context(s)[-1]


def _grouped_query(node: gs.Node, sizes: _Sizes) -> Count:
    """Two products of a call's queries with all keys so far, including keys that the causal mask hides."""
    context, keys = sizes.shape(node.outputs[0]), sizes.shape(node.outputs[1])
    return lambda s: 4 * _elements(context(s)) * keys(s)[2]


def _chosen(node: gs.Node, sizes: _Sizes) -> Count:
    """Chosen rows of one or two matrices of weights with x [..., width] → [..., rows]."""
    x, rows = sizes.shape(node.inputs[0]), _rows(node, node.outputs[0], sizes)
    matrices = 2 if node.op == SPARSE_UP.name and _has_input(node, _GATE) else 1
    return lambda s: 2 * matrices * rows(s) * x(s)[-1]


def _sum_of_chosen(node: gs.Node, sizes: _Sizes) -> Count:
    """The sum of chosen rows of weights, weighted by h [..., rows] → [..., width]."""
    rows, y = _rows(node, node.inputs[0], sizes), sizes.shape(node.outputs[0])
    return lambda s: 2 * rows(s) * y(s)[-1]


def _rows(node: gs.Node, h: gs.Tensor, sizes: _Sizes) -> Count:
    """Rows of weights that a sparse op reads for all tokens together; h has the shape [..., rows]."""
    room = sizes.shape(h)
    if not node.attrs.get("at_most", 0):
        return lambda s: _elements(room(s))
    blocks, block = sizes.value(node.inputs[_BLOCKS]), int(node.attrs["block"])

    def count(s: Sizes) -> int:
        chosen, tokens = blocks(s) >= 0, _elements(room(s)[:-1])
        each = 1 if len(chosen) == tokens else tokens  # otherwise the tokens share one choice
        return block * each * int(chosen.sum())

    return count


def _has_input(node: gs.Node, place: int) -> bool:
    return len(node.inputs) > place and node.inputs[place].name != ""


def _elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


_COUNTERS: dict[str, Callable[[gs.Node, _Sizes], Count]] = {
    "Conv": _conv, "FusedMatMul": _matmul, "Gemm": _gemm, "GroupQueryAttention": _grouped_query,
    "Int4Linear": _int4, "Int8Linear": _matmul, "MatMul": _matmul, "MatMulInteger": _matmul,
    "MatMulNBits": _blocks, "PackedAttention": _attention, "QLinearMatMul": _matmul, "SparseDown": _sum_of_chosen,
    "SparseHead": _chosen, "SparseUp": _chosen,
}  # fmt: skip
_UNKNOWN = frozenset(["Attention", "ConvInteger", "ConvTranspose", "Einsum", "MultiHeadAttention", "QAttention"])
