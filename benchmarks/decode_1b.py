"""Decoding with a 1.1 B LLaMA shape, batch 1: python benchmarks/decode_1b.py --json

The model has random weights, written by this script: 2048 wide, FFN 5632, 22 layers, 32 heads of which 4 hold keys and
values, 32 000 tokens. Compiled to 5 % of its FFN neurons and the HiRE head, in fp32, int8 and int4, and timed in one
run with the dense model in the same loop. What memory must deliver per token bounds every engine: bytes by bandwidth.
Random weights say nothing about quality; that is what ../shared's trained models are for.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.sources import Source
from trimtab.plugins.library import instruction_set

SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
CONTEXT = 128  # tokens in the cache when a step is timed
DENSITY = 0.05


def recipe(form: str) -> list[Any]:
    """5 % of the neurons, 128 candidates; what is left dense in the same form."""
    passes: list[Any] = [
        {"ffn-topk": {"density": DENSITY, "take": DENSITY, "rank": 128, "block": 8, "form": form, "weights": form}},
        {"head-topk": {"take": 128, "rank": 128, "form": form, "weights": form}},
    ]
    if form != "fp32":
        passes.append({"weight-only": {"bits": int(form.removeprefix("int")), "parts": ["attention"]}})
    return passes


def write_model(folder: Path, layers: int) -> Path:
    """The checkpoint as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    return folder


def write_data(source: Source, path: Path) -> Path:
    """Random tokens to calibrate on: arrays, since there is no tokenizer."""
    rng, samples, tokens = np.random.default_rng(0), 64, 32
    arrays: dict[str, np.ndarray] = {}
    for tensor in source.graph().inputs:
        if tensor.name == "input_ids":
            arrays[tensor.name] = rng.integers(0, SIZES["vocab_size"], (samples, tokens))
        elif tensor.name == "attention_mask":
            arrays[tensor.name] = np.ones((samples, tokens), np.int64)
        else:
            arrays[tensor.name] = np.zeros((samples, tensor.shape[1], 0, tensor.shape[3]), np.float32)
    np.savez(path, **arrays)
    return path


def stepper(folder: Path, threads: int) -> Callable[[], object]:
    """A call that decodes one token behind CONTEXT others."""
    steps = load(folder, threads=threads, verify=False).runner.steps(1, CONTEXT + 1)
    rng = np.random.default_rng(0)
    steps.run(rng.integers(0, SIZES["vocab_size"], (1, CONTEXT)), np.ones((1, CONTEXT), np.int64))
    mask = np.ones((1, CONTEXT + 1), np.int64)
    return lambda: steps.run(rng.integers(0, SIZES["vocab_size"], (1, 1)), mask)


def read_bytes(passes: list[dict[str, Any]], attention: int, form: str) -> float:
    """Bytes of weights that a token needs."""
    ffn, head = (each["details"] for each in passes[:2])
    per = {"fp32": 4.0, "int8": 1 + 4 / 32, "int4": 0.5 + 4 / 32}[form]
    return sum(row["read_bytes"] for row in ffn["layers"]) + head["read_bytes"] + attention * per


def main(
    forms: Annotated[str, typer.Option(help="Some of fp32,int8,int4.")] = "fp32,int8,int4",
    layers: Annotated[int, typer.Option(help="Fewer, for a try.")] = SIZES["num_hidden_layers"],
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="Of timing, all engines together.")] = 60.0,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    d, kv = SIZES["hidden_size"], SIZES["hidden_size"] // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    attention = layers * (2 * d * d + 2 * d * kv)
    results: dict[str, Any] = {
        "versions": package_versions(), "command": " ".join(sys.argv), "instructions": instruction_set(),
        "layers": layers, "context": CONTEXT, "engines": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="trimtab-1b-") as work:
        say("writing and exporting the model")
        source = open_source(write_model(Path(work) / "model", layers))
        data = write_data(source, Path(work) / "data.npz")
        limits: dict[str, Any] = {
            "workload": {"batch": 1, "tokens": [1, 1, 128]}, "check": False,
            "calibration": {"samples": 64, "states": 1024},
        }  # fmt: skip
        runs: dict[str, Callable[[], object]] = {}
        dense = compile_model(source, limits | {"passes": []}, Path(work) / "dense")
        runs["dense fp32"] = stepper(dense.path, threads)
        for form in forms.split(","):
            say(f"compiling {form}")
            start = time.perf_counter()
            build = compile_model(source, limits | {"passes": recipe(form)}, Path(work) / form, data=data)
            needed = read_bytes([p.model_dump() for p in build.manifest.passes], attention, form)
            results["engines"][form] = {
                "compile_seconds": time.perf_counter() - start, "phases": build.manifest.seconds,
                "peak_bytes": build.manifest.peak_memory_bytes, "dense_bytes": build.manifest.sizes.dense_bytes,
                "bytes_per_token": needed,
            }  # fmt: skip
            runs[f"trimtab {form}"] = stepper(build.path, threads)
        say("timing")
        for name, taken in interleave(runs, seconds=seconds).items():
            form = name.removeprefix("trimtab ")
            found = results["engines"].setdefault(form, {})
            found["median_ms"] = taken.median_ms
            if "bytes_per_token" in found:
                found["gb_s"] = found["bytes_per_token"] / taken.median_ms / 1e6
        slow = results["engines"]["dense fp32"]["median_ms"]
        for found in results["engines"].values():
            found["speedup_of_dense_fp32"] = slow / found["median_ms"]
    text = json.dumps(results, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        for name, found in results["engines"].items():
            print(f"{name}: {found['median_ms']:.1f} ms, {found['speedup_of_dense_fp32']:.2f} of dense fp32")


if __name__ == "__main__":
    typer.run(main)
