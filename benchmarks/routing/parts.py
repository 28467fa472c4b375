"""The FFNs of a model as a model of their own, to time them alone on what they read in the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.feeds import Run
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.graph import load_graph, save_graph

Feeds = Mapping[str, np.ndarray]


def ends(graph: gs.Graph) -> list[tuple[gs.Tensor, gs.Tensor]]:
    """(x, y) of each FFN, of a dense model or one whose FFNs are sparse ops."""
    dense = [(ffn.x, ffn.y) for ffn in find_anatomy(graph).ffns]
    downs = {id(node.inputs[1]): node.outputs[0] for node in graph.nodes if node.op == "SparseDown"}
    sparse = []
    for node in graph.nodes:
        if node.op == "SparseUp":
            y = downs[id(node.inputs[1])]
            if [user.op for user in y.outputs] == ["Add"] and isinstance(y.outputs[0].inputs[1], gs.Constant):
                y = y.outputs[0].outputs[0]  # its bias
            sparse.append((node.inputs[0], y))
    return dense + sparse


def ffn_part(model: Path, out: Path) -> Path:
    """Write all FFNs of `model` as one model: x0, x1, ... that they read, and dials → each one's y."""
    graph = load_graph(model)
    found = ends(graph)
    dials = [tensor for tensor in graph.inputs if len(tensor.shape) == 1]
    reads = inputs_of(found)
    for number, x in enumerate(reads):
        x.inputs.clear()
        x.name, x.dtype = f"x{number}", np.dtype(np.float32)
    graph.inputs, graph.outputs = [*reads, *dials], [y for _, y in found]
    for y in graph.outputs:
        y.dtype = np.dtype(np.float32)
    graph.cleanup(remove_unused_graph_inputs=True, recurse_functions=False)
    save_graph(graph, out)
    return out


def inputs_of(found: Sequence[tuple[gs.Tensor, gs.Tensor]]) -> list[gs.Tensor]:
    """Each x of `ends` once."""
    return list({id(x): x for x, _ in found}.values())


def record(model: Path, given: Sequence[Feeds], folder: Path, threads: int = 2) -> list[dict[str, np.ndarray]]:
    """What the FFNs of `model` read of each of `given`, as `ffn_part` names it."""
    graph = load_graph(model)
    reads = inputs_of(ends(graph))
    for x in reads:
        x.dtype = np.dtype(np.float32)
        if all(x is not output for output in graph.outputs):
            graph.outputs.append(x)
    path = folder / "recorded.onnx"
    save_graph(graph, path)
    runner, inputs = OnnxRuntimeRunner(path, session_options(threads)), {tensor.name for tensor in graph.inputs}
    found = []
    for feeds in given:
        outputs = runner.run({name: value for name, value in feeds.items() if name in inputs})
        found.append({f"x{number}": outputs[x.name] for number, x in enumerate(reads)})
    del runner
    for file in (path, path.with_name(path.name + ".data")):
        file.unlink(missing_ok=True)
    return found


def open_part(part: Path, threads: int = 2) -> Run:
    """A call of the model `part`, which leaves out of the feeds what it does not take."""
    runner = OnnxRuntimeRunner(part, session_options(threads, spinning=True))
    names = set(runner.inputs)
    return lambda feeds: runner.run({name: value for name, value in feeds.items() if name in names})


def turns(run: Run, given: Sequence[Feeds]) -> Callable[[], object]:
    """A call of `run` with one of `given` after the other."""
    each = cycle(given)
    return lambda: run(next(each))
