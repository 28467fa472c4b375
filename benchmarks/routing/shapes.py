"""Layers of LLaMA2-7B's shape with random weights, half of whose neurons random routers leave out: decoding, by batch.

Random routers choose independently for each token: the union of a batch grows as fast as it can. Those of a trained
model overlap more, as the decoder's part shows, whose perplexities say what such a sparsity costs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from sparse_ffn import copy_bound

from routing.counted import at_dials
from routing.decoder import CONTEXT, STEPS, stepper
from routing.parts import ffn_part, open_part, turns
from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.timing import REST_S, Timing, interleave
from trimtab.compiler.sources import Source
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.ffn_route.routers import Routers
from trimtab.passes.profile import Profile, ProfileInfo

SIZES = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip
GROUP = 32
STATES = 256
WANTED = {"ffn_ratio": 1.8, "stack_ratio": 1.4}
VARIED = 16  # inputs of each batch, which choose other groups

DENSE: dict[str, dict[str, list[Any]]] = {
    "fp32": {"dense": []},
    "int8": {"dense": [{"dynamic-int8": {"scales": "auto"}}], "dense, weights alone": [{"weight-only": {"bits": 8}}]},
}
ROUTED: dict[str, list[Any]] = {
    "fp32": ["ffn-route"],
    "int8": [{"ffn-route": {"weights": "int8"}}, {"dynamic-int8": {"scales": "auto"}}],
}
BYTES = {"fp32": 4, "int8": 1}
Say = Callable[[str], None]


def write_model(folder: Path, layers: int) -> Path:
    """A LLaMA of random weights, as a Hugging Face directory; its head is too small to count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    return folder


def random_profile(source: Source) -> Profile:
    """Routers that choose about half of the groups of each token, and states by which a compile sees that."""
    rng, tensors = np.random.default_rng(0), {"learned.lte.threshold": np.array([0.5], np.float32)}
    for ffn in find_anatomy(source.graph()).ffns:
        weight = rng.standard_normal((ffn.d_ff // GROUP, ffn.d_model), np.float32) * np.float32(2 * ffn.d_model**-0.5)
        tensors[f"learned.lte.router.{ffn.layer}.weight"] = weight
        tensors[f"learned.lte.router.{ffn.layer}.bias"] = np.zeros(len(weight), np.float32)
        tensors[f"ffn.{ffn.layer}.states"] = rng.standard_normal((STATES, ffn.d_model), np.float32)
    info = ProfileInfo(model=source.fingerprint, data="random", samples=STATES, tokens=STATES)
    return Profile(info, tensors)


def measure(
    work: Path, *, layers: int, sizes: Sequence[int], precisions: Sequence[str], seconds: float, say: Say
) -> dict[str, Any]:
    """Time of the FFNs alone and of the whole layers, routed beside dense, for each precision and batch."""
    say("shapes: writing and exporting the model")
    source = open_source(write_model(work / "shapes", layers))
    profile, bandwidth = random_profile(source), copy_bound(2)
    given = {size: inputs(size, layers) for size in sizes}
    grown = {str(size): union(profile, xs) for size, xs in given.items()}
    rows: list[dict[str, Any]] = []
    dense_part = ffn_part(source.onnx, work / "dense-ffn.onnx")
    for precision in precisions:
        say(f"shapes: compiling for {precision}")
        builds = {name: build(source, passes, work / f"{precision}-{name}", None)
                  for name, passes in DENSE[precision].items()}  # fmt: skip
        parts = {name: build(open_source(dense_part), passes, work / f"{precision}-{name}-ffn", None).model
                 for name, passes in DENSE[precision].items()}  # fmt: skip
        if precision == "int8":
            parts["dense, ONNX Runtime"] = quantized(dense_part)
        for size in sizes:
            say(f"shapes: {precision}, batch {size}")
            routed = builds["routed"] = build(source, ROUTED[precision], work / "routed", profile, size)
            report = routed.manifest.passes[0]
            row = {"precision": precision, "batch": size, "routed_ffns": report.changed}
            if report.changed:
                parts["routed"] = ffn_part(routed.model, work / "routed-ffn.onnx")
                row |= time_ffns(parts, given[size], at_dials(routed.manifest, size, {}), seconds / len(sizes) / 2)
                row |= time_stack(builds, size, seconds / len(sizes) / 2)
                read = bytes_read(source, report.details["layers"], BYTES[precision], grown[str(size)])
                rows.append(row | bounds(read, bandwidth))
            else:  # the same graph as the dense build's
                rows.append(row | {"left_dense": report.left[0].why})
            shutil.rmtree(routed.path)
    return {
        "layers": layers, "sizes": SIZES, "group": GROUP, "context": CONTEXT, "memory_gb_s": bandwidth,
        "union": grown, "wanted_at_batch_1": WANTED, "quality": "that of `decoder`: these weights are random",
        "rows": rows,
    }  # fmt: skip


def inputs(size: int, layers: int) -> list[dict[str, np.ndarray]]:
    """What the FFNs read, behind a norm: x of each layer, [size, 1, width], `VARIED` times."""
    rng, width = np.random.default_rng(size), SIZES["hidden_size"]
    return [{f"x{i}": rng.standard_normal((size, 1, width), np.float32) for i in range(layers)} for _ in range(VARIED)]


def union(profile: Profile, given: Sequence[dict[str, np.ndarray]]) -> float:
    """Share of the groups that any token of a batch computes."""
    routers = Routers.of(profile.learned("lte"))
    shares = []
    for layer, router in routers.by_layer.items():
        for xs in given:
            chosen = routers.chosen(router.scores(xs[f"x{layer}"][:, 0]), routers.default)
            shares.append(chosen.any(0).mean())
    return float(np.mean(shares))


def build(source: Source, passes: list[Any], out: Path, profile: Profile | None, size: int = 1) -> Build:
    """For batches of `size`, above all."""
    recipe = {
        "passes": passes, "threads": 2, "check": False,
        "workload": {"batch": [1, size, 16], "tokens": [1, 1, CONTEXT], "past": [0, CONTEXT, 2 * CONTEXT]},
    }  # fmt: skip
    return compile_model(source, recipe, out, profile=profile)


def time_ffns(
    parts: dict[str, Path], given: Sequence[dict[str, np.ndarray]], dials: dict[str, np.ndarray], seconds: float
) -> dict[str, float]:
    """All FFNs alone, beside the fastest dense form."""
    runs = {name: open_part(path) for name, path in parts.items()}
    feeds = [xs | dials for xs in given]
    return beside_dense("ffn", interleave({name: turns(run, feeds) for name, run in runs.items()},
                                          seconds=seconds, rest=REST_S))  # fmt: skip


def time_stack(builds: dict[str, Build], size: int, seconds: float) -> dict[str, Any]:
    """One step of decoding through all layers, beside the fastest dense form."""
    engines = {name: load(each.path, verify=False) for name, each in builds.items()}
    ids = np.random.default_rng(size).integers(0, SIZES["vocab_size"], (size, CONTEXT + STEPS))
    taken = interleave({name: stepper(each, ids) for name, each in engines.items()}, seconds=seconds, rest=REST_S)
    return beside_dense("stack", taken) | {"tokens_per_s": 1000 * size / taken["routed"].median_ms}


def beside_dense(what: str, taken: dict[str, Timing]) -> dict[str, Any]:
    """Milliseconds of the routed form and of the fastest dense one, and how many times as fast it is."""
    dense = {name: timing.median_ms for name, timing in taken.items() if name != "routed"}
    best, routed = min(dense, key=dense.__getitem__), taken["routed"].median_ms
    return {f"{what}_ratio": dense[best] / routed, f"{what}_dense_ms": dense[best], f"{what}_dense_form": best,
            f"{what}_routed_ms": routed}  # fmt: skip


def bytes_read(
    source: Source, layers: Sequence[dict[str, Any]], per: float, taken: float
) -> dict[str, dict[str, float]]:
    """Bytes of weights that a step reads.

    Args:
        layers: of the report of ffn-route.
        per: bytes of a weight.
        taken: share of the neurons that any token of the batch computes.
    """
    ffns, graph = find_anatomy(source.graph()).ffns, source.graph()
    whole = sum(int(np.prod(node.inputs[1].shape)) for node in graph.nodes if node.op == "MatMul"
                and isinstance(node.inputs[1], gs.Constant))  # fmt: skip
    of_ffns = sum(ffn.params for ffn in ffns)
    routers = sum(row["router_bytes"] for row in layers)
    ffn = {"dense": of_ffns * per, "routed": taken * of_ffns * per + routers}
    return {"ffn": ffn, "stack": {name: each + (whole - of_ffns) * per for name, each in ffn.items()}}


def bounds(read: dict[str, dict[str, float]], bandwidth: float) -> dict[str, float]:
    """What memory allows: ratios by bytes, and milliseconds at `bandwidth`, GB/s."""
    found = {}
    for what, each in read.items():
        found[f"{what}_bound_ratio"] = each["dense"] / each["routed"]
        found |= {f"{what}_{name}_bound_ms": size / bandwidth / 1e6 for name, size in each.items()}
    return found
