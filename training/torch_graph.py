"""A graph as a torch module, so that any model, also after passes, can be trained."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from torch import Tensor, nn
from torch.nn import functional

from trimtab.passes.contract import Rounding
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import output_name_of, values
from trimtab.passes.graph.linear import Linear, match_linear
from trimtab.training.ops import OPS
from trimtab.training.ops.dtypes import to_torch
from trimtab.training.rounding import rounded_activations, rounded_weight

_NORMS = {
    "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}  # fmt: skip


_ROUNDED = "/rounded"  # suffix of the names of rounded tensors


@dataclass(frozen=True)
class _Step:
    """One call: names of its input and output tensors, and of tensors that no later step reads."""

    call: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    where: str
    done: tuple[str, ...] = ()


def learnable(graph: gs.Graph) -> list[str]:
    """Initializers worth training: weights and biases of Linears, scales and biases of norms.

    Embedding tables are excluded: a step would update all their rows, although a batch uses few.
    """
    trainable: dict[str, gs.Constant] = {}
    for node in graph.nodes:
        linear = match_linear(node)
        if linear is not None:
            parts: Iterable[gs.Tensor | None] = (linear.weight if linear.quantized is None else None, linear.bias)
        else:
            parts = [t for t in node.inputs if _numel(t) > 1] if node.op in _NORMS else []
        trainable.update((t.name, t) for t in parts if isinstance(t, gs.Constant))
    return [name for name, t in trainable.items() if _is_float(t) and all(user.op != "Gather" for user in t.outputs)]


class GraphModule(nn.Module):
    """Runs the nodes of a graph with torch operators, so that gradients reach its initializers.

    All floating point is computed in float32 (or as autocast decides), whatever type the graph keeps its weights in. A
    product with a constant matrix and the addition of its bias run as one call; what depends on constants alone is
    computed once, here.

    Args:
        graph: is read, not kept.
        train: names of the initializers that become parameters; all other constants are buffers.
        outputs: names of the tensors to compute; by default the graph's outputs. Nodes they do not need are left out.
        rounding: rounding of the operands of floating-point products; none by default.

    Raises:
        ModelError: an operator or one of its attributes is not supported; names node and operator.
    """

    def __init__(
        self, graph: gs.Graph, *, train: Collection[str] = (), outputs: Sequence[str] | None = None,
        rounding: Rounding | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        graph.toposort()
        tensors = graph.tensors()
        self.outputs = list(outputs) if outputs is not None else [t.name for t in graph.outputs]
        self.inputs = [t.name for t in graph.inputs]
        self.trained = [name for name in train if name in tensors]
        self._dtypes = [np.dtype(tensors[name].dtype) for name in self.trained]
        self.weights = nn.ParameterList(nn.Parameter(to_torch(values(tensors[name]))) for name in self.trained)
        self._constants: list[str] = []
        self._steps = self._plan(graph, rounding)

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute `outputs` from the graph's inputs, both by name."""
        have: dict[str, Any] = {name: getattr(self, f"constant{i}") for i, name in enumerate(self._constants)}
        have.update(zip(self.trained, self.weights, strict=True))
        have.update(feeds)
        on_host = all(feed.device.type == "cpu" for feed in feeds.values())
        for step in self._steps:
            arguments = [have[name] if name else None for name in step.inputs]
            self._run(step, arguments if on_host else _together(arguments), have)
            for name in step.done:
                del have[name]
        return {name: have[name] for name in self.outputs}

    def learned(self) -> dict[str, np.ndarray]:
        """The parameters as arrays of the initializers' own types, by initializer name."""
        pairs = zip(self.trained, self._dtypes, self.weights, strict=True)
        return {name: p.detach().cpu().numpy().astype(dtype, copy=True) for name, dtype, p in pairs}

    @staticmethod
    def _run(step: _Step, arguments: list[Any], have: dict[str, Any]) -> None:
        try:
            result = step.call(*arguments)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"node {step.where}: cannot run it in torch ({error})",
                hint="train the model from its Hugging Face directory, or export it again",
            ) from error
        if isinstance(result, tuple):
            have.update(zip(step.outputs, result, strict=False))
        else:
            have[step.outputs[0]] = result

    def _plan(self, graph: gs.Graph, rounding: Rounding | None) -> list[_Step]:
        """The steps of each call. Steps on constants are computed here, once."""
        required = {*self.outputs}
        fused, covered = _fusable(graph, required)
        steps: list[_Step] = []
        constants: dict[str, Any] = {}
        for node in reversed(graph.nodes):
            if id(node) in covered or not required.intersection(t.name for t in node.outputs):
                continue
            linear = fused.get(id(node))
            steps.append(_step(node) if linear is None else _linear_step(linear, rounding))
            if rounding is not None and _reads_table(node):  # rounded too, with one scale, and not for a tied head
                step = steps[-1]
                steps[-1] = _Step(step.call, (step.inputs[0] + _ROUNDED, *step.inputs[1:]), step.outputs, step.where)
            required.update(name.removesuffix(_ROUNDED) for name in steps[-1].inputs)
            if linear is not None and linear.quantized is not None:
                constants[linear.weight.name] = to_torch(linear.w())
        for name, tensor in graph.tensors().items():
            if isinstance(tensor, gs.Constant) and name in required and name not in {*constants, *self.trained}:
                constants[name] = to_torch(values(tensor))
                if rounding is not None and any(_reads_table(user) for user in tensor.outputs):
                    constants[name + _ROUNDED] = rounded_activations(constants[name])
        kept: list[_Step] = []
        round_x = partial(rounded_activations, per_row=rounding is not None and rounding.per_row)
        there: set[str] = set()  # rounded tensors; several products may read one
        for step in reversed(steps):
            if all(not name or name in constants for name in step.inputs):
                self._run(step, [constants[name] if name else None for name in step.inputs], constants)
            else:
                for name in {name for name in step.inputs if name.endswith(_ROUNDED)} - there - constants.keys():
                    there.add(name)
                    kept.append(_Step(round_x, (name.removesuffix(_ROUNDED),), (name,), step.where))
                kept.append(step)
        used = {name for step in kept for name in step.inputs}.union(self.outputs)
        for name, value in constants.items():
            if name in used:
                self.register_buffer(f"constant{len(self._constants)}", value, persistent=False)
                self._constants.append(name)
        return _release(kept, keep={*self.outputs, *self._constants, *self.trained})


def _fusable(graph: gs.Graph, required: set[str]) -> tuple[dict[int, Linear], set[int]]:
    """Linears by their last node's id, and the ids of the nodes before it, which need not run."""
    fused: dict[int, Linear] = {}
    covered: set[int] = set()
    for node in graph.nodes:
        linear = match_linear(node)
        if linear is None:
            continue
        if not required.intersection(n.outputs[0].name for n in linear.nodes[:-1]):
            fused[id(linear.nodes[-1])] = linear
            covered.update(id(n) for n in linear.nodes[:-1])
    return fused, covered


def _reads_table(node: gs.Node) -> bool:
    """True for a Gather from a constant of floats."""
    return node.op == "Gather" and isinstance(node.inputs[0], gs.Constant) and _is_float(node.inputs[0])


def _linear_step(linear: Linear, rounding: Rounding | None) -> _Step:
    as_stored = linear.transposed and linear.quantized is None
    rounds = rounding if linear.quantized is None else None  # integers in blocks stay what they are

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if rounds is not None:
            weight = rounded_weight(weight, 0 if as_stored else 1, rounds)
        return functional.linear(x, weight if as_stored else weight.t(), None if bias is None else bias.reshape(-1))

    x_name = linear.x.name + (_ROUNDED if rounds is not None else "")
    inputs = (x_name, linear.weight.name, linear.bias.name if linear.bias is not None else "")
    return _Step(call, inputs, (linear.y.name,), _where(linear.nodes[-1]))


def _step(node: gs.Node) -> _Step:
    domain = "" if node.domain in (None, "", "ai.onnx") else node.domain
    function = OPS.get((domain, node.op))
    if function is None:
        raise ModelError(
            f"node {_where(node)}: training does not know this operator",
            hint="put a pass that makes it behind `recover`; export a model that has it with torch.onnx.export",
        )
    attributes = {name: _attribute(value) for name, value in node.attrs.items()}
    unknown = _unknown(function, attributes)
    if unknown:
        raise ModelError(f"node {_where(node)}: training does not know its attribute {unknown!r}")
    call = partial(function, **attributes) if attributes else function
    return _Step(call, tuple(t.name for t in node.inputs), tuple(t.name for t in node.outputs), _where(node))


def _attribute(value: Any) -> Any:
    return to_torch(values(value)) if isinstance(value, gs.Constant) else value


def _unknown(function: Callable[..., Any], attributes: Mapping[str, Any]) -> str | None:
    """The first attribute that `function` does not take; the functions of torch itself in the table take none."""
    if not attributes:
        return None
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return next(iter(attributes))
    return next((name for name in attributes if name not in parameters), None)


def _release(steps: list[_Step], keep: set[str]) -> list[_Step]:
    """Release every tensor after its last use, to limit peak memory."""
    left = Counter(name for step in steps for name in {*step.inputs} if name)
    live: set[str] = set()
    result = []
    for step in steps:
        live.update(name for name in step.outputs if name)
        left.subtract(name for name in {*step.inputs} if name)
        done = {n for n in (*step.inputs, *step.outputs) if n in live and left[n] == 0 and n not in keep}
        live -= done
        result.append(_Step(step.call, step.inputs, step.outputs, step.where, tuple(done)))
    return result


def _together(arguments: list[Any]) -> list[Any]:
    """Move tensors computed from shapes, on the CPU, to the device of the other arguments."""
    device = next((a.device for a in arguments if isinstance(a, Tensor) and a.device.type != "cpu"), None)
    return [a.to(device) if isinstance(a, Tensor) and device is not None else a for a in arguments]


def _where(node: gs.Node) -> str:
    domain = f"{node.domain}::" if node.domain not in (None, "", "ai.onnx") else ""
    return f"{output_name_of(node)!r} ({domain}{node.op})"


def _is_float(tensor: gs.Constant) -> bool:
    return np.dtype(tensor.dtype).name in ("float16", "bfloat16", "float32", "float64")


def _numel(tensor: gs.Tensor) -> int:
    return int(np.prod(tensor.shape)) if isinstance(tensor, gs.Constant) else 0
