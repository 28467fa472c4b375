"""Decoding with a 1.1 B LLaMA shape, batch 1: python benchmarks/decode_1b.py --llama-python PATH --json

The model has random weights, written by this script: 2048 wide, FFN 5632, 22 layers, 32 heads of which 4 hold keys and
values, 32 000 tokens. Compiled to 5 % of its FFN neurons and the HiRE head, in fp32, int8 and int4, and timed in one
run with the dense model and with peers of the same shape: onnxruntime-genai's int4 as its model builder writes it, and
llama.cpp's Q8_0 and Q4_0. Each compile and each engine is a process of its own; engines wait, idle, for their turns.
What memory must deliver per token bounds every engine: bytes by bandwidth, which is measured in the same run.
Random weights say nothing about quality; that is what ../shared's trained models are for.

llama.cpp needs an interpreter of its own: python -m venv llama && llama/bin/pip install --no-binary llama-cpp-python
llama-cpp-python gguf (compiles it for this processor), and then --llama-python llama/bin/python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from peers.models import HERE as PEERS
from peers.models import genai_bytes, llama_model, with_tokenizer

from trimtab.compiler import open_source
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.decoders.genai import build_genai
from trimtab.compiler.checks.timing import interleave
from trimtab.plugins.library import instruction_set

SIZES = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
CONTEXT = 128  # tokens in the cache when a step is timed
DENSITY = 0.05
MEMORY = 1 << 29  # bytes summed for the bandwidth
LIMITS: dict[str, Any] = {
    "workload": {"batch": 1, "tokens": [1, 1, 128]}, "check": False, "calibration": {"samples": 64, "states": 1024},
}  # fmt: skip
WANTED = (("int8", "llama.cpp Q8_0", 2.5), ("int4", "llama.cpp Q4_0", 1.8), ("int4", "onnxruntime-genai int4", 2.0))

COMPILE = """
import json, sys
from trimtab.compiler import compile_model
made = compile_model(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], data=sys.argv[4]).manifest
print(json.dumps({"phases": made.seconds, "peak_bytes": made.peak_memory_bytes, "dense_bytes": made.sizes.dense_bytes,
                  "passes": [p.model_dump() for p in made.passes]}))
"""


def recipe(form: str) -> list[Any]:
    """5 % of the neurons, 128 candidates; what is left dense in the same form, int8 with a scale for each row."""
    if form == "dense fp32":
        return []
    sizes = {"form": form, "weights": form}
    passes: list[Any] = [
        {"ffn-topk": {"density": DENSITY, "take": DENSITY, "rank": 128, "block": 8, "max_error": None} | sizes},
        {"head-topk": {"take": 128, "rank": 128} | sizes},
    ]
    if form == "int8":
        passes.append({"dynamic-int8": {"scales": "auto"}})
    if form == "int4":
        passes.append({"weight-only": {"bits": 4, "parts": ["attention"]}})
    return passes


def write_model(folder: Path, layers: int) -> Path:
    """The checkpoint as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    return folder


def write_data(model: Path, path: Path) -> Path:
    """Random tokens to calibrate on: arrays, since there is no tokenizer."""
    rng, samples, tokens = np.random.default_rng(0), 64, 32
    arrays: dict[str, np.ndarray] = {}
    for tensor in open_source(model).graph().inputs:
        if tensor.name == "input_ids":
            arrays[tensor.name] = rng.integers(0, SIZES["vocab_size"], (samples, tokens))
        elif tensor.name == "attention_mask":
            arrays[tensor.name] = np.ones((samples, tokens), np.int64)
        else:
            arrays[tensor.name] = np.zeros((samples, tensor.shape[1], 0, tensor.shape[3]), np.float32)
    np.savez(path, **arrays)
    return path


def compiled(model: Path, form: str, out: Path, data: Path, attention: int) -> dict[str, Any]:
    """Compile in a process of its own; what its manifest says of that, and the bytes that a token needs."""
    wanted = json.dumps(LIMITS | {"passes": recipe(form)})
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, model, wanted, out, data], stdout=subprocess.PIPE, text=True, check=True
    )
    found = {"compile_seconds": time.perf_counter() - start} | json.loads(run.stdout.splitlines()[-1])
    found["peak_of_weights"] = found["peak_bytes"] / found["dense_bytes"]
    passes = found.pop("passes")
    if passes:
        ffn, head = (each["details"] for each in passes[:2])
        per = {"fp32": 4.0, "int8": 1.0, "int4": 0.5 + 2 / 32}[form]
        read = sum(row["read_bytes"] for row in ffn["layers"]) + head["read_bytes"] + attention * per
    else:
        read = found["dense_bytes"] - 4 * SIZES["vocab_size"] * SIZES["hidden_size"]  # of the table one row is read
    return found | {"bytes_per_token": read}


def main(
    forms: Annotated[str, typer.Option(help="Some of fp32,int8,int4.")] = "fp32,int8,int4",
    layers: Annotated[int, typer.Option(help="Fewer, for a try.")] = SIZES["num_hidden_layers"],
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="Of timing, all engines together.")] = 120.0,
    llama_python: Annotated[Path | None, typer.Option(help="An interpreter that has llama-cpp-python, gguf.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    d, kv = SIZES["hidden_size"], SIZES["hidden_size"] // SIZES["num_attention_heads"] * SIZES["num_key_value_heads"]
    engines: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    rest = {"threads": threads, "context": CONTEXT, "vocabulary": SIZES["vocab_size"]}
    with tempfile.TemporaryDirectory(prefix="trimtab-1b-") as work, Children() as children:
        folder = Path(work)
        os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
        say("writing and exporting the model")
        model = write_model(folder / "model", layers)
        data = write_data(model, folder / "data.npz")
        for form in ("dense fp32", *forms.split(",")):
            say(f"compiling {form}")
            engines[form] = compiled(model, form, folder / form, data, layers * (2 * d * d + 2 * d * kv))
        if importlib.util.find_spec("onnxruntime_genai"):
            say("building the peer of onnxruntime-genai")
            build_genai(with_tokenizer(model, SIZES["vocab_size"], folder / "given"), folder / "genai")
            engines["onnxruntime-genai int4"] = {"bytes_per_token": genai_bytes(folder / "genai", SIZES)}
        else:
            missing.append("onnxruntime-genai")
        if llama_python is not None:
            for form in ("Q8_0", "Q4_0"):
                say(f"writing the peer of llama.cpp in {form}")
                found = llama_model(llama_python, form, SIZES | {"num_hidden_layers": layers}, folder / f"{form}.gguf")
                engines[f"llama.cpp {form}"] = {"bytes_per_token": found}
        else:
            missing.append("llama.cpp (--llama-python)")
        say("timing")
        children.start("memory", sys.executable, PEERS / "memory_steps.py", size=MEMORY, threads=threads)
        for name in engines:
            if name.startswith("llama.cpp"):
                path = folder / f"{name[-4:]}.gguf"
                children.start(name, llama_python or "", "llama_steps.py", path=path, **rest)
            elif name.startswith("onnxruntime-genai"):
                children.start(name, sys.executable, "genai_steps.py", path=folder / "genai", **rest)
            else:
                children.start(name, sys.executable, "trimtab_steps.py", path=folder / name, **rest)
        taken = interleave(children.steps, seconds=seconds)
    bandwidth = MEMORY / taken.pop("memory").median_ms / 1e6
    for name, timing in taken.items():
        found = engines[name]
        found |= children.about[name] | {"median_ms": timing.median_ms, "samples": timing.samples}
        found["bound_ms"] = found["bytes_per_token"] / bandwidth / 1e6
        found["of_bound"] = found["bound_ms"] / timing.median_ms
        found["speedup_of_dense_fp32"] = taken["dense fp32"].median_ms / timing.median_ms
    ratios = {
        f"{ours} against {theirs}": {"times_as_fast": taken[theirs].median_ms / taken[ours].median_ms, "wanted": wanted}
        for ours, theirs, wanted in WANTED
        if {ours, theirs} <= taken.keys()
    }
    results = {
        "versions": package_versions(), "command": " ".join(sys.argv), "instructions": instruction_set(),
        "layers": layers, "context": CONTEXT, "threads": threads, "memory_gb_s": bandwidth, "missing": missing,
        "ratios": ratios, "engines": engines,
    }  # fmt: skip
    text = json.dumps(results, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
        return
    print(f"memory: {bandwidth:.1f} GB/s{''.join(f'; {name} is missing' for name in missing)}")
    for name, found in engines.items():
        print("{}: {median_ms:.1f} ms, {of_bound:.2f} of its bound".format(name, **found))
        if "peak_of_weights" in found:
            print("  compiled in {compile_seconds:.0f} s, {peak_of_weights:.2f} times the weights".format(**found))
    for name, ratio in ratios.items():
        print("{}: {times_as_fast:.2f} times as fast, wanted {wanted}".format(name, **ratio))


if __name__ == "__main__":
    typer.run(main)
