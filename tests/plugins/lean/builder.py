"""What a builder does with an AOT plugin, as far as its Python layer can tell: expressions, descriptors, one tactic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorrt as trt
from tensorrt.plugin import _tensor

OPERATIONS = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
    "LESS": lambda a, b: int(a < b),
    "EQUAL": lambda a, b: int(a == b),
    "MAX": max,
    "MIN": min,
    "COUNTED": lambda counted, upper: min(counted, upper),
}


class Expr(trt.IDimensionExpr):
    """A number, a name, or an operation on two of them. TensorRT's own cannot be made from Python."""

    value: Any

    @classmethod
    def of(cls, value: Any) -> Expr:
        made = cls.__new__(cls)
        made.value = value
        return made

    def is_constant(self) -> bool:
        return isinstance(self.value, int)

    def get_constant_value(self) -> int:
        assert isinstance(self.value, int)
        return self.value

    def at(self, names: Mapping[str, int]) -> int:
        """Its value, with the sizes of one run."""
        if isinstance(self.value, int):
            return self.value
        if isinstance(self.value, str):
            return names[self.value]
        operation, a, b = self.value
        return int(OPERATIONS[operation](a.at(names), b.at(names)))


class Builder:
    """A trt.IExprBuilder that folds constants."""

    def constant(self, value: int) -> Expr:
        return Expr.of(int(value))

    def operation(self, operation: Any, a: Expr, b: Expr) -> Expr:
        made = Expr.of((operation.name, a, b))
        return Expr.of(made.at({})) if a.is_constant() and b.is_constant() else made

    def declare_size_tensor(self, index: int, opt: Expr, upper: Expr) -> Expr:
        return Expr.of(("COUNTED", Expr.of(f"output {index}"), upper))


class Setter:
    """Takes the run-time sizes of a kernel."""

    def __init__(self) -> None:
        self.taken: dict[int, Any] = {}
        self.nbSymExprs = 0

    def __setitem__(self, place: int, value: Any) -> None:
        self.taken[place] = value


@dataclass
class Launch:
    """What TensorRT would launch."""

    kernel: str
    code: bytes
    grid: tuple[Any, ...]
    block: tuple[Any, ...]
    shared: Any
    extra: list[Any]


@dataclass
class Tensor:
    """An input: sizes by name where they vary."""

    kind: str
    shape: Sequence[int | str]

    def desc(self, sizes: Mapping[str, tuple[int, int]]) -> Any:
        """Descriptor in the largest range that a profile allows."""
        made = trt.DynamicPluginTensorDesc()
        made.desc.dims = tuple(-1 if isinstance(size, str) else size for size in self.shape)
        made.desc.type = getattr(trt.DataType, self.kind)
        made.desc.format = trt.TensorFormat.LINEAR
        for place in (0, 1):
            numbers = tuple(sizes[size][place] if isinstance(size, str) else size for size in self.shape)
            setattr(made, ("min", "max")[place], numbers)
        made.opt = made.max
        return made


def patch(monkeypatch: Any) -> None:
    """Have the layer's classes hold expressions of Python."""
    monkeypatch.setattr(trt, "DimsExprs", lambda size: [None] * size)
    monkeypatch.setattr(_tensor, "SymExprImpl", lambda symbol: symbol._expr)


def create(name: str, attributes: Mapping[str, int]) -> Any:
    """The plugin of a node, as the ONNX parser asks for it: the fields that its creator names, as int32."""
    creator = trt.get_plugin_registry().get_creator(name, "1", "trimtab")
    assert creator is not None, f"{name} is not in the registry"
    number = trt.PluginFieldType.INT32
    fields = [trt.PluginField(f.name, _int32(attributes[f.name]), number) for f in creator.field_names]
    strict = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin(name, "trimtab", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, strict)


def _int32(value: int) -> Any:
    return np.array([value], np.int32)


def outputs_of(plugin: Any, tensors: Sequence[Tensor]) -> tuple[list[Any], list[list[Any]]]:
    """Types and shapes of the outputs."""
    kinds = [getattr(trt.DataType, tensor.kind) for tensor in tensors]
    results = plugin.get_output_data_types(kinds, [len(tensor.shape) for tensor in tensors])
    shapes = [[Expr.of(size) for size in tensor.shape] for tensor in tensors]
    return results, plugin.get_output_shapes(shapes, [], Builder())


def tune(plugin: Any, tensors: Sequence[Tensor], sizes: Mapping[str, tuple[int, int]]) -> Any:
    """Descriptors of inputs and outputs, and the tactics for the types that the network has."""
    kinds, shapes = outputs_of(plugin, tensors)
    inputs = [tensor.desc(sizes) for tensor in tensors]
    outputs = [Tensor(kind.name, [-1] * len(shape)).desc({}) for kind, shape in zip(kinds, shapes, strict=True)]
    descs = [*inputs, *outputs]
    offered = plugin.get_supported_format_combinations(descs, len(tensors))
    assert [desc.type for desc in offered] == [desc.desc.type for desc in descs]
    plugin.configure_plugin(inputs, outputs)
    return descs, plugin.get_valid_tactics()


def launch(plugin: Any, descs: Sequence[Any], tactic: int, outputs: int = 1) -> Launch:
    """What a tactic launches, with so many outputs."""
    count = len(descs) - outputs
    params, setter = _Params(), Setter()
    plugin.set_tactic(tactic)
    plugin.get_launch_params(None, descs, count, params, setter, Builder())
    kernel, code = plugin.get_kernel([d.desc for d in descs[:count]], [d.desc for d in descs[count:]])
    extra = [setter.taken[place] for place in range(setter.nbSymExprs)]
    grid, block = (tuple(getattr(params, f"{name}_{axis}") for axis in "xyz") for name in ("grid", "block"))
    return Launch(kernel, code, grid, block, params.shared_mem, extra)


class _Params:
    """A trt.IKernelLaunchParams."""
