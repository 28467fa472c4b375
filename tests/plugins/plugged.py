"""Graphs with nodes of plugins, brought back to ops that ONNX Runtime runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from trimtab.plugins import DOMAIN
from trimtab.plugins.dialect import Form
from trimtab.plugins.emit import add_body, type_of
from trimtab.plugins.tensorrt import PLUGINS


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output, by the reference bodies."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def back(graph: gs.Graph) -> None:
    """Plugins' nodes as those of the ops again, by what the nodes and the table of plugins say alone."""
    for node in graph.nodes:
        plugin = PLUGINS.get(node.op) if node.domain == DOMAIN else None
        if plugin is None:
            continue
        assert list(node.attrs) == [
            *(a.name for a in plugin.op.attributes), "plugin_namespace", "plugin_version", "aot"
        ]  # fmt: skip
        assert node.attrs["plugin_namespace"] == "trimtab" and node.attrs["plugin_version"] == "1"
        assert node.attrs["aot"] == 1
        numbers = {a.name: node.attrs[a.name] for a in plugin.op.attributes}
        assert all(type(value) is int for value in numbers.values())
        given = dict(zip(plugin.inputs, node.inputs, strict=True))
        named = dict(zip(plugin.outputs, node.outputs, strict=True))
        node.op, node.attrs = plugin.op.name, plugin.decode(numbers)
        node.inputs = [given.get(i.name, gs.Variable.empty()) for i in plugin.op.inputs]
        node.outputs = [named.get(o.name, gs.Variable.empty()) for o in plugin.op.outputs]
        add_body(graph, plugin.op, Form({name: type_of(t) for name, t in given.items()}, node.attrs))
