"""Declares plugins to TensorRT in the process that builds: their outputs, their tactics, and their kernels."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.plugins.dialect import DOMAIN, Form, Value
from trimtab.plugins.sizes import Counted
from trimtab.plugins.tensorrt.expressions import raw, sizes_of
from trimtab.plugins.tensorrt.kernels import compiled, kernel_of, tactics, this_gpu, tile_of
from trimtab.plugins.tensorrt.names import PLUGINS, Plugin

__all__ = ["missing", "register"]

_TYPES = {
    "FLOAT": ("tensor(float)", "FP32"),
    "HALF": ("tensor(float16)", "FP16"),
    "BF16": ("tensor(bfloat16)", "BF16"),
    "INT8": ("tensor(int8)", "INT8"),
    "INT32": ("tensor(int32)", "INT32"),
}
"""Name of a tensorrt.DataType → ONNX's name, and that of the grammar of combinations."""


_INSTALL = 'pip install "trimtab[tensorrt]"'


def missing() -> str | None:
    """What this machine lacks to declare plugins, with what to do about it; None where all is there."""
    if importlib.util.find_spec("tensorrt") is None:
        return f"TensorRT is not installed; {_INSTALL}, with NVIDIA's own package index as an extra index"
    if importlib.util.find_spec("triton") is None:
        return f"the Triton language, in which the kernels are written, is not installed; {_INSTALL}"
    try:
        import tensorrt.plugin as trtp
    except ImportError:
        return "this TensorRT has no Python plugins; install 10.9 or later"
    return None if hasattr(trtp, "aot_impl") else "this TensorRT embeds no kernels of plugins; install 10.9 or later"


def register(names: Iterable[str] | None = None, capability: int | None = None) -> None:
    """Declare plugins, before a parser meets them. Those that are declared already are left as they are.

    Args:
        names: as `plugins_of(model)` and `prepare(graph)` return them; all that there are by default.
        capability: compute capability that kernels are compiled for, such as 90; that of this machine's GPU by default,
            which is asked for when the first kernel is.

    Raises:
        ValueError: there is no plugin of that name.
        RuntimeError: `missing()`.
    """
    selected = tuple(PLUGINS if names is None else names)
    for name in selected:
        if name not in PLUGINS:
            raise ValueError(f"no plugin of trimtab is called {name!r}")
    if selected and (lack := missing()) is not None:
        raise RuntimeError(lack)
    for name in selected:
        _register(PLUGINS[name], capability)


def _register(plugin: Plugin, capability: int | None) -> None:
    import tensorrt.plugin as trtp

    if hasattr(getattr(trtp.op, DOMAIN, None), plugin.name):
        return
    name, callbacks = f"{DOMAIN}::{plugin.name}", _Callbacks(plugin, capability)
    tensors = [_parameter(i, trtp.TensorDesc) for i in plugin.inputs]
    attributes = [_parameter(a.name, int) for a in plugin.op.attributes]
    count = len(plugin.outputs) + len(kernel_of(plugin.op).counted)
    every: Any = tuple.__class_getitem__((trtp.TensorDesc,) * count)
    outputs, tactic = _parameter("outputs", every), _parameter("tactic", int)
    kernel = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    described = _signed(callbacks.describe, [*tensors, *attributes], trtp.TensorDesc if count == 1 else every)
    trtp.register(name)(described)
    trtp.autotune(name)(_signed(callbacks.tune, [*tensors, *attributes, outputs], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(_signed(callbacks.embed, [*tensors, *attributes, outputs, tactic], kernel))


def _parameter(name: str, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)


def _signed(call: Any, parameters: Sequence[inspect.Parameter], returned: Any) -> Any:
    """`call` under a signature of its own, which is all that TensorRT's validators look at."""

    def signed(*given: Any, **named: Any) -> Any:
        return call(*inspect.Signature(parameters).bind(*given, **named).args)

    signed.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return signed


class _Callbacks:
    """What TensorRT calls, each with the given inputs' descriptors first and the attributes behind them."""

    def __init__(self, plugin: Plugin, capability: int | None) -> None:
        self.plugin = plugin
        self.capability = capability

    def describe(self, *arguments: Any) -> Any:
        """Shape and type of each output; then the sizes that the kernel counts, which TensorRT reads from tensors."""
        import tensorrt as trt
        import tensorrt.plugin as trtp

        tensors, attributes = self._divide(arguments)
        inferred = self.plugin.op.infer(_shapes(self.plugin, tensors), attributes)
        counts: dict[str, Any] = {}

        def expression(size: Any) -> Any:
            if not isinstance(size, Counted):
                return raw(size)
            if size.name not in counts:
                upper_bound = trtp.ShapeExpr(raw(size.at_most))
                counts[size.name] = trtp.size_tensor(upper_bound, upper_bound)
            return counts[size.name].expr()

        descs = []
        for output in (o for o in self.plugin.op.outputs if o.name in self.plugin.outputs):
            shape = inferred[output.name]
            assert shape is not None
            own = next((kind for kind, (name, _) in _TYPES.items() if name == output.type), None)
            kind = tensors[output.follows].dtype if output.follows else getattr(trt.DataType, str(own))
            descs.append(trtp.from_shape_expr(tuple(expression(size) for size in shape), kind))
        descs += [counts[name] for name in kernel_of(self.plugin.op).counted]
        return descs[0] if len(descs) == 1 else tuple(descs)

    def tune(self, *arguments: Any) -> list[Any]:
        """The types of the network as they are, since it is strongly typed; and every tile that is worth timing."""
        import tensorrt.plugin as trtp

        *rest, outputs = arguments
        tensors, attributes = self._divide(rest)
        form, shapes = self._form(tensors, attributes), _static(tensors)
        kinds = ", ".join(_TYPES[desc.dtype.name][1] for desc in (*tensors.values(), *outputs))
        capability = self.capability or this_gpu()
        numbers = tactics(kernel_of(self.plugin.op), form, shapes, _most_tokens(tensors), capability)
        return [trtp.AutoTuneCombination(kinds, "LINEAR", numbers)]

    def embed(self, *arguments: Any) -> tuple[str, str, Any, Any]:
        """Kernel, launch and run-time sizes of a tactic."""
        import tensorrt.plugin as trtp

        *rest, _, tactic = arguments
        tensors, attributes = self._divide(rest)
        form, static = self._form(tensors, attributes), _static(tensors)
        kernel = kernel_of(self.plugin.op)
        if (reason := kernel.refuses(form, static)) is not None:
            raise ValueError(f"{self.plugin.name}: {reason}")
        tile = tile_of(kernel, form, static, tactic)
        binary = compiled(kernel, form, static, tile, self.capability or this_gpu())
        shapes = _shapes(self.plugin, tensors)
        outputs = self.plugin.op.infer(shapes, attributes)
        sizes = kernel.measure({name: shape for name, shape in (shapes | outputs).items() if shape is not None})
        grid = [raw(size) for size in kernel.grid(sizes, binary.constants, tile)]
        launch = trtp.KernelLaunchParams(*grid, block_x=binary.threads, shared_mem=binary.shared_bytes)
        extra = trtp.SymIntExprs(len(kernel.sizes))
        for place, name in enumerate(kernel.sizes):
            extra[place] = trtp.SymInt32(raw(sizes[name]))
        return binary.name, binary.ptx, launch, extra

    def _divide(self, arguments: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Value]]:
        """Descriptors by name of input, and the op's attributes."""
        inputs, op = self.plugin.inputs, self.plugin.op
        tensors = dict(zip(inputs, arguments[: len(inputs)], strict=True))
        encoded = {a.name: int(v) for a, v in zip(op.attributes, arguments[len(inputs) :], strict=True)}
        return tensors, self.plugin.decode(encoded)

    def _form(self, tensors: Mapping[str, Any], attributes: Mapping[str, Value]) -> Form:
        kinds = {name: _TYPES[desc.dtype.name][0] for name, desc in tensors.items()}
        return Form(kinds, attributes, self.plugin.unnamed)


def _shapes(plugin: Plugin, tensors: Mapping[str, Any]) -> dict[str, list[Any] | None]:
    """Shapes in expressions; None for the inputs that this form leaves out."""
    return {i.name: sizes_of(tensors[i.name].shape_expr) if i.name in tensors else None for i in plugin.op.inputs}


def _static(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes in numbers, -1 for sizes that vary; there are numbers only once the builder tunes."""
    return {name: tuple(desc.shape) for name, desc in tensors.items()}


def _most_tokens(tensors: Mapping[str, Any]) -> int:
    """Of the first input, in the largest shape that the profile allows."""
    shape = next(iter(tensors.values())).shape
    sizes = shape.max if shape.is_dynamic else tuple(shape)
    product = 1
    for size in sizes[:-1]:
        product *= int(size)
    return product
