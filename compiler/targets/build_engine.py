"""The child process that parses graphs with TensorRT, or TensorRT-RTX, and builds an engine.

`python -m trimtab.compiler.targets.build_engine JOB ANSWER`, two JSON files. The job has

- `models`: paths of ONNX files to parse;
- `engine`: null, or the path to write the engine of the first of them to;
- `profile`: input name → [min, opt, max] shapes of that engine.

The answer has `refused`, for each model a list of {node, op, reason}, and, when an engine was asked for and nothing of
its model was refused, `engine`, what is worth knowing of it. Which of the two libraries is used is decided by
POLYGRAPHY_USE_TENSORRT_RTX, which Polygraphy reads when it is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
from polygraphy import config as polygraphy_config
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile, create_network
from polygraphy.mod.trt_importer import lazy_import_trt

trt = lazy_import_trt()

_SAME_ELSEWHERE = ("DequantizeLinear", "Gelu", "QuantizeLinear")
"""Ops of com.microsoft that mean what the ONNX ops of their names mean."""


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    answer: dict[str, Any] = {"refused": [refused_nodes(model) for model in job["models"]]}
    if job["engine"] and not answer["refused"][0]:
        answer["engine"] = build(job["models"][0], job["profile"], Path(job["engine"]))
    Path(answer_file).write_text(json.dumps(answer))


def refused_nodes(model: str) -> list[dict[str, str]]:
    """What TensorRT's parser refuses in the ONNX file `model`: {node, op, reason}, in the order of the graph."""
    _, network = create_network(**_typing())
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    proto = onnx.load(model, load_external_data=False)
    supported = parser.supports_model_v2(proto.SerializeToString(), model)
    errors = [] if supported else [parser.get_error(i) for i in range(parser.num_errors)]
    reasons = {error.node(): error.desc() for error in errors if error.node() >= 0}
    functions = {(function.domain, function.name) for function in proto.functions}
    refused = []
    for index, node in enumerate(
        proto.graph.node
    ):  # the parser stops at the first fault, so the other ops are asked for
        if (node.domain, node.op_type) in functions:
            reason = reasons.get(index)
        elif _mistaken(node):
            reason = "the parser would take it for the ONNX op of the same name"
        elif not parser.supports_operator(node.op_type):
            reason = "not an op that the parser knows"
        else:
            reason = reasons.get(index)
        if reason:
            op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            refused.append({"node": node.name or node.output[0], "op": op, "reason": reason})
    if not supported and not refused:  # faults of no node of the graph: an initializer's type, a node in a subgraph
        refused = [{"node": e.node_name(), "op": e.node_operator(), "reason": e.desc()} for e in errors]
    return refused


def _mistaken(node: onnx.NodeProto) -> bool:
    """Whether the op only shares its name with an ONNX op: the parser sees names alone, and no domains."""
    return node.domain not in ("", "ai.onnx") and onnx.defs.has(node.op_type) and node.op_type not in _SAME_ELSEWHERE


def build(model: str, profile: dict[str, list[list[int]]], path: Path) -> dict[str, Any]:
    """Build the engine, write it to `path`, and say what it is."""
    shapes = Profile()
    for name, (low, opt, high) in profile.items():
        shapes.add(name, min=low, opt=opt, max=high)
    builder, network, parser = NetworkFromOnnxPath(model, **_typing())()
    config = CreateConfig(profiles=[shapes])(builder, network)
    engine = EngineBytesFromNetwork((builder, network, parser), config)()
    with path.open("wb") as file:
        file.write(engine)
    return {
        "library": trt.__name__,
        "version": trt.__version__,
        "precisions": _precisions(network),
        "compute_capabilities": _compute_capabilities(config),
        "profile": profile,
    }


def _typing() -> dict[str, bool]:
    """Types come from the ONNX graph alone; the newest TensorRT knows nothing else and has no such flag."""
    return {"strongly_typed": hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")}


def _precisions(network: Any) -> list[str]:
    """Types of all tensors that the network's layers make, by TensorRT's names."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return sorted({layer.get_output_type(i).name for layer in layers for i in range(layer.num_outputs)})


def _compute_capabilities(config: Any) -> list[str]:
    """GPUs that the engine was asked to run on; empty where that was left to TensorRT."""
    if not hasattr(config, "num_compute_capabilities"):
        return []
    return [config.get_compute_capability(i).name for i in range(config.num_compute_capabilities)]


if __name__ == "__main__":
    polygraphy_config.AUTOINSTALL_DEPS = False
    main(*sys.argv[1:])
