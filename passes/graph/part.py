"""Runs a part of a graph: computes some of its tensors from the values of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import quoted
from trimtab.passes.graph.io import save_graph
from trimtab.passes.ort_errors import opening, running
from trimtab.passes.temporary import temporary_folder

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["nodes_between", "open_part", "run_part"]


def nodes_between(starts: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> Iterator[gs.Node]:
    """The nodes that compute `outputs` from `starts`, constants and the graph's inputs."""
    seen = {id(tensor) for tensor in starts}
    nodes: set[int] = set()
    stack = [tensor for tensor in outputs if id(tensor) not in seen]
    while stack:
        tensor = stack.pop()
        for node in tensor.inputs:
            if id(node) not in nodes:
                nodes.add(id(node))
                yield node
                stack += [t for t in node.inputs if id(t) not in seen]


def run_part(
    graph: gs.Graph, starts: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor], feeds: dict[str, np.ndarray]
) -> list[np.ndarray]:
    """The values of `outputs`, computed by ONNX Runtime on the CPU, in one thread, without the dialect's kernels.

    Args:
        starts: tensors within the graph with known values; the nodes before them do not run.
        feeds: name → values, for the tensors in `starts` and the graph's inputs that `outputs` depend on.
    """
    session = open_part(graph, starts, outputs, {name: list(array.shape) for name, array in feeds.items()})
    with running(_part_name(outputs)):
        results: list[np.ndarray] = session.run(
            None, {tensor.name: feeds[tensor.name] for tensor in session.get_inputs()}
        )
    return results


def open_part(
    graph: gs.Graph,
    starts: Sequence[gs.Tensor],
    outputs: Sequence[gs.Tensor],
    shapes: Mapping[str, Sequence[int | None]],
) -> ort.InferenceSession:
    """A session that computes `outputs`, as `run_part` does.

    Args:
        shapes: name → shape, for the tensors in `starts` and the graph's inputs that `outputs` depend on.
    """
    import onnxruntime as ort  # late: commands that only read manifests do not need it

    for tensor in outputs:
        tensor.dtype = tensor.dtype or np.float32  # unknown after ops without type inference
    nodes = list(nodes_between(starts, outputs))
    read = {tensor.name for node in nodes for tensor in node.inputs}
    inputs = [
        gs.Variable(tensor.name, tensor.dtype or np.float32, list(shapes[tensor.name]))
        for tensor in {id(tensor): tensor for tensor in (*starts, *graph.inputs)}.values()
        if tensor.name in read
    ]
    part = gs.Graph(
        nodes, inputs, list(outputs), opset=graph.opset, import_domains=graph.import_domains,
        ir_version=graph.ir_version, functions=graph.functions,
    )  # fmt: skip
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    with temporary_folder("part") as folder:
        path = folder / "part.onnx"
        save_graph(part, path)
        with opening(_part_name(outputs)):
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _part_name(outputs: Sequence[gs.Tensor]) -> str:
    """The name of the part in errors."""
    return f"the part of the graph that computes {quoted(outputs[0].name)}"
