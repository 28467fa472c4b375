"""Names and attributes of plugins, which have a fixed number of inputs: each form of an op is a plugin of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import onnx

from trimtab.plugins.dialect import DOMAIN, Attribute, Input, Op, Output, Value
from trimtab.plugins.tensorrt.kernels import launches

__all__ = ["PLUGINS", "Plugin", "plugins_of"]


@dataclass(frozen=True)
class Plugin:
    """One op with a choice of its optional inputs and outputs.

    Attributes:
        inputs: names of those that are given, in the op's order.
        outputs: names of those that are named, in the op's order.
    """

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of op and what is optional: SparseUpPlugin_up_bias_gate. No op is called so, for the parser goes by names."""
        optional = {part.name for parts in (self.op.inputs, self.op.outputs) for part in parts if part.optional}
        return "_".join([f"{self.op.name}Plugin", *(n for n in (*self.inputs, *self.outputs) if n in optional)])

    @property
    def unnamed(self) -> frozenset[str]:
        """The op's outputs that this form leaves out."""
        return frozenset(o.name for o in self.op.outputs) - set(self.outputs)

    def encode(self, attributes: Mapping[str, Value]) -> dict[str, int]:
        """The node's attributes as the plugin has them: all, in order, as integers. A string is its place among the
        choices, since the parser may hand strings over with a NUL at their end."""
        return {a.name: _encoded(a, attributes.get(a.name, a.default)) for a in self.op.attributes}

    def decode(self, encoded: Mapping[str, int]) -> dict[str, Value]:
        """The op's attributes again."""
        return {a.name: a.choices[encoded[a.name]] if a.choices else encoded[a.name] for a in self.op.attributes}


def _encoded(attribute: Attribute, value: Value) -> int:
    return attribute.choices.index(str(value)) if attribute.choices else int(value)


def _subsets(names: list[str]) -> chain[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


def _forms(op: Op) -> list[Plugin]:
    return [Plugin(op, given, named) for given in _choices(op.inputs) for named in _choices(op.outputs)]


def _choices(parts: Sequence[Input] | Sequence[Output]) -> list[tuple[str, ...]]:
    """Names of inputs or outputs, with every choice of the optional ones."""
    subsets = _subsets([part.name for part in parts if part.optional])
    return [tuple(part.name for part in parts if not part.optional or part.name in subset) for subset in subsets]


PLUGINS: dict[str, Plugin] = {plugin.name: plugin for op, _ in launches().values() for plugin in _forms(op)}
"""Name → plugin, of all that there can be. Those of a graph are what is registered."""


def plugins_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the plugins that a prepared model uses, subgraphs and functions included."""
    names: set[str] = set()
    for graph in (model.graph, *model.functions):
        _collect(graph, names)
    return tuple(sorted(names))


def _collect(graph: Any, names: set[str]) -> None:
    for node in graph.node:
        if node.domain == DOMAIN and any(a.name == "plugin_namespace" for a in node.attribute):
            names.add(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _collect(attribute.g, names)
