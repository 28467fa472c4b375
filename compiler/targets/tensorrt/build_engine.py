"""The child process that parses graphs with TensorRT, or TensorRT-RTX, builds engines, and loads them once.

`python -m trimtab.compiler.targets.tensorrt.build_engine JOB ANSWER`, two JSON files. The job has

- `models`: paths of ONNX files to parse;
- `plugins`: names of the dialect's plugins to register first;
- `build`: null, or the options of the build of one engine per model: `engines`, the paths to write; `profiles`, for
  each model a list of {name, shapes: input → [min, opt, max]}; `gpus`, `weight_streaming` and `refit` from the recipe;
  `timing_cache`, the path of a file;
- `load`: null, or [{engine, shapes: input → shape}], engines to load and run once.

The answer has `refused`, for each model a list of {node, op, reason}; `built`, facts about the engines, when the job
has `build` and nothing was refused; and `gpus`, the compute capabilities that the library can build for, empty where it
builds for the GPU of this machine. POLYGRAPHY_USE_TENSORRT_RTX selects the library; Polygraphy reads it at import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from polygraphy import config as polygraphy_config
from polygraphy.backend.trt import (
    CreateConfig,
    EngineBytesFromNetwork,
    EngineFromBytes,
    NetworkFromOnnxPath,
    Profile,
    TrtRunner,
    create_network,
)
from polygraphy.datatype import DataType
from polygraphy.mod.trt_importer import lazy_import_trt

trt = lazy_import_trt()

_SAME_ELSEWHERE = ("DequantizeLinear", "Gelu", "QuantizeLinear")
"""Ops of com.microsoft with the meaning of the ONNX op of the same name."""


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    if job.get("plugins"):
        from trimtab.plugins.tensorrt import register

        register(job["plugins"])
    answer: dict[str, Any] = {"refused": [refused_nodes(model) for model in job["models"]], "gpus": _known_gpus()}
    if job["build"] and not any(answer["refused"]):
        answer["built"] = build_all(job["models"], job["build"])
    for each in job.get("load") or ():
        load_once(Path(each["engine"]), each["shapes"])
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
    ):  # the parser stops at the first fault, so each op is checked by name
        if (node.domain, node.op_type) in functions or _is_plugin(node):
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
    if not supported and not refused:  # faults outside the graph's nodes: an initializer's type, a node in a subgraph
        refused = [{"node": e.node_name(), "op": e.node_operator(), "reason": e.desc()} for e in errors]
    return refused


def _is_plugin(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "plugin_namespace" for attribute in node.attribute)


def _mistaken(node: onnx.NodeProto) -> bool:
    """Whether the op only shares its name with an ONNX op: the parser ignores domains."""
    return node.domain not in ("", "ai.onnx") and onnx.defs.has(node.op_type) and node.op_type not in _SAME_ELSEWHERE


def build_all(models: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Build and write one engine for each of `models`; returns `built` of the answer."""
    _check_offered(options)
    precisions: set[str] = set()
    engines = []
    for model, path, profiles in zip(models, options["engines"], options["profiles"], strict=True):
        description, types = build(model, profiles, Path(path), options)
        engines.append(description)
        precisions |= set(types)
    return {
        "library": trt.__name__,
        "version": trt.__version__,
        "precisions": sorted(precisions),
        "engines": engines,
    }


def build(
    model: str, profiles: list[dict[str, Any]], path: Path, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Build one engine; returns its inputs, outputs and profiles, and the names of its tensor types."""
    builder, network, parser = NetworkFromOnnxPath(model, **_typing())()
    config = CreateConfig(
        profiles=[_profile(each["shapes"]) for each in profiles],
        refittable=options["refit"] or None,
        weight_streaming=options["weight_streaming"] or None,
        load_timing_cache=_existing(options["timing_cache"]),
    )(builder, network)
    _set_gpus(config, options["gpus"])
    timing = options["timing_cache"]
    engine = EngineBytesFromNetwork((builder, network, parser), config, save_timing_cache=timing)()
    with path.open("wb") as file:
        file.write(engine)
    sides = {
        "inputs": [network.get_input(i) for i in range(network.num_inputs)],
        "outputs": [network.get_output(i) for i in range(network.num_outputs)],
    }
    tensors = {side: [_description(tensor) for tensor in listed] for side, listed in sides.items()}
    return {"profiles": profiles, **tensors}, _precisions(network)


def load_once(path: Path, shapes: dict[str, list[int]]) -> None:
    """Load an engine and run it on zeros."""
    with TrtRunner(EngineFromBytes(path.read_bytes())) as runner:
        types = runner.get_input_metadata(use_numpy_dtypes=False)
        zeros = {name: np.zeros(shape, _same_size(types[name].dtype)) for name, shape in shapes.items()}
        runner.infer(zeros, check_inputs=False, copy_outputs_to_host=False)  # numpy has no bfloat16 to copy to


def _same_size(dtype: DataType) -> Any:
    """A numpy type for zeros of `dtype`; for bfloat16, which numpy lacks, a type of as many bits."""
    return np.int16 if dtype == DataType.BFLOAT16 else dtype.numpy()


def _profile(shapes: dict[str, list[list[int]]]) -> Profile:
    profile = Profile()
    for name, (low, opt, high) in shapes.items():
        profile.add(name, min=low, opt=opt, max=high)
    return profile


def _check_offered(options: dict[str, Any]) -> None:
    for option, flag in (("weight_streaming", "WEIGHT_STREAMING"), ("refit", "REFIT")):
        if options[option] and not hasattr(trt.BuilderFlag, flag):
            raise SystemExit(f"{trt.__name__} {trt.__version__} offers no {option}; leave engine.{option} out")
    if options["gpus"]:
        supported = _known_gpus()
        for gpu in options["gpus"]:
            if gpu not in supported:
                targets = ", ".join(supported) or "the GPU of this machine"
                raise SystemExit(f"{trt.__name__} {trt.__version__} builds for no GPU {gpu}, but for: {targets}")


def _known_gpus() -> list[str]:
    """Compute capabilities that the library can build for, besides the GPU of this machine."""
    names = dir(trt.ComputeCapability) if hasattr(trt, "ComputeCapability") else []
    return [f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM")]


def _sm(gpu: str) -> str:
    return "SM" + gpu.replace(".", "")


def _set_gpus(config: Any, gpus: list[str]) -> None:
    """Set the compute capabilities `gpus` in `config`; without any, the library's defaults apply."""
    if gpus:
        config.num_compute_capabilities = len(gpus)
        for number, gpu in enumerate(gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, _sm(gpu)), number)


def _existing(path: str | None) -> str | None:
    return path if path and Path(path).is_file() else None


def _description(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


def _typing() -> dict[str, bool]:
    """Types come from the ONNX graph alone. The newest TensorRT always works so, and lacks the flag."""
    return {"strongly_typed": hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")}


def _precisions(network: Any) -> list[str]:
    """Types of all outputs of the network's layers, by TensorRT's names."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    return sorted({layer.get_output_type(i).name for layer in layers for i in range(layer.num_outputs)})


if __name__ == "__main__":
    polygraphy_config.AUTOINSTALL_DEPS = False
    main(*sys.argv[1:])
