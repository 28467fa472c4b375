"""What tests of passes share: canonical graphs, Profiles of random states, and parts of a graph to run alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort

from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.profile import FFNStats, Profile, ProfileInfo
from trimtab.plugins.library import register


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    register(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def canonical(path: Path) -> gs.Graph:
    graph = load_graph(path)
    run_passes(graph, [Canonicalize()], PassContext())
    return graph


def profile_of(graph: gs.Graph, *, states: int = 300, seed: int = 0) -> Profile:
    """A Profile of random states: what calibration would write, without running the model."""
    rng = np.random.default_rng(seed)
    profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=states))
    for ffn in find_anatomy(graph).ffns:
        x = rng.standard_normal((states, ffn.d_model)).astype(np.float32)
        h = np.abs(rng.standard_normal((states, ffn.d_ff)))
        stats = FFNStats(states, h.sum(0), h.sum(0), np.square(h).sum(0), x)
        profile.set_ffn(ffn.layer, stats)
    return profile


def head_profile(graph: gs.Graph, states: int = 400) -> Profile:
    """As `profile_of`, with states before the head, most of which lie in few directions."""
    found, head = profile_of(graph), find_anatomy(graph).head
    assert head is not None
    rng = np.random.default_rng(1)
    width = head.linears[-1].in_features
    mixed = rng.standard_normal((states, width)) @ (rng.standard_normal((width, width)) / np.arange(1, width + 1))
    found.set_head(mixed.astype(np.float32))
    return found


def run_part(graph: gs.Graph, x: str, y: str, value: np.ndarray, folder: Path) -> np.ndarray:
    """Feed `value`, [1, n, d_model], as the tensor called `x` and read the one called `y`."""
    part = graph.copy()
    tensors = part.tensors()
    source, sink = tensors[x], tensors[y]
    source.inputs.clear()
    part.inputs, part.outputs = [source], [sink]
    source.shape, sink.shape = ["batch", "tokens", value.shape[-1]], None
    source.dtype = sink.dtype = np.float32
    part.cleanup()
    save_graph(part, folder / "part.onnx")
    found: np.ndarray = session(folder / "part.onnx").run(None, {x: value})[0]
    return found
