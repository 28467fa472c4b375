"""FFNs of a real language model that compute fewer neurons: python benchmarks/ffn_frontier.py MODEL.gguf --output FILE

SmolLM2-135M-Instruct (SwiGLU, see llm.py), all weights int8, one row of a matrix with one scale, without training.
Each way to choose neurons, and each setting of it: perplexity of WikiText-2's validation text, token by token; bytes of
FFN weights that a token reads, as a share of the dense ones in int8; milliseconds of a step at batch 1 behind 128
tokens, all engines in one run. Sparse FFNs are made whether they are faster or not, to be measured.

`error` is what the passes themselves measured on held-out states: squared error of the FFNs' outputs relative to their
variance, the mean over all layers. plot_frontier.py draws the results.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from llm import CONTEXT, HERE, MEMORY, PEERS, TOKENS, recipe_of, some_of, write_text

from trimtab.compiler import compile_model
from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.speed import this_machine
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.sources.gguf import unpacked
from trimtab.plugins.library import instruction_set

ALWAYS: dict[str, Any] = {"weights": "int8", "most": 1.0, "max_error": None}
DEFAULT = 0.5  # of a dial, at which the pass measures
SPARSITIES = (0.2, 0.35, 0.5, 0.65, 0.8)
REST = {"rest": {"rank": 64}}


def threshold(**more: Any) -> list[Any]:
    return [{"ffn-threshold": {"sparsity": DEFAULT} | ALWAYS | more}]


def topk(density: float, **more: Any) -> list[Any]:
    chosen = {"density": density, "take": density, "block": 8, "form": "int8"} | ALWAYS | more
    return [{"ffn-topk": chosen}]


def fitted(sparsity: float, **more: Any) -> list[Any]:
    return [{"ffn-route": {"router": "fitted", "sparsity": sparsity, "group": 8} | ALWAYS | more}]


WAYS: dict[str, list[tuple[list[Any], str, tuple[float, ...]]]] = {
    "dense": [([], "", (0.0,))],
    "threshold": [(threshold(), "ffn_sparsity", SPARSITIES)],
    "threshold, with a rest": [(threshold(**REST), "ffn_sparsity", SPARSITIES)],
    "threshold, blocks of 8": [(threshold(block=8), "ffn_sparsity", (0.2, 0.35, 0.5))],
    "top-k, rank 64": [(topk(density), "", (1 - density,)) for density in (0.75, 0.5, 0.25)],
    "top-k, rank 64, with a rest": [(topk(density, **REST), "", (1 - density,)) for density in (0.75, 0.5, 0.25)],
    "top-k of int4 copies": [
        (topk(density, predictor="copy", form="int4", signal="both"), "", (1 - density,)) for density in (0.5, 0.25)
    ],
    "fitted routers": [(fitted(sparsity), "", (sparsity,)) for sparsity in (0.25, 0.5)],
}
"""Way → its builds: passes, the dial that is turned, and shares of the neurons that are left out."""


def ffn_layers(build: Build) -> list[dict[str, Any]]:
    """What the pass that made the FFNs sparse says of each layer; none of a dense build."""
    return [row for report in build.manifest.passes for row in report.details.get("layers", []) if "read_bytes" in row]


def share_read(rows: list[dict[str, Any]], made: float, sparsity: float) -> float:
    """Bytes of FFN weights that a token reads at `sparsity`, of all in int8; rows tell them for `made`."""
    dense = sum(row["dense_bytes"] for row in rows) / 4  # of fp32
    spared = sum(row["bytes"] - row["read_bytes"] for row in rows) / made
    return (sum(row["bytes"] for row in rows) - sparsity * spared) / dense


def main(
    model: Annotated[Path, typer.Argument(help="A GGUF file of LLaMA's architecture.")],
    only: Annotated[str, typer.Option(help="Some of the ways, with semicolons between.")] = ";".join(WAYS),
    blocks: Annotated[int, typer.Option(help=f"Of {TOKENS} tokens, for perplexities.")] = 12,
    threads: int = 2,
    seconds: Annotated[float, typer.Option(help="Of timing steps, all engines together.")] = 120,
    shared: Annotated[Path, typer.Option(help="Folder with data/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f} s  {text}", file=sys.stderr, flush=True)

    ways = some_of(WAYS, only, ";")
    begun, points = time.monotonic(), {}
    checkpoint = unpacked(model)
    vocabulary = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="trimtab-frontier-") as work, Children() as children:
        folder = Path(work)
        text, data = write_text(checkpoint, shared, blocks, folder)
        common = {"threads": threads, "context": CONTEXT, "vocabulary": vocabulary, "text": text}
        for way in ways:
            for i, (passes, dial, sparsities) in enumerate(WAYS[way]):
                say(f"compiling {way}, {sparsities}")
                recipe = recipe_of([*passes, {"dynamic-int8": {"scales": "auto"}}], threads)
                build = compile_model(model, recipe, folder / f"{way}.{i}", data=data if passes else None)
                rows = ffn_layers(build)
                for sparsity in sparsities:
                    name, made = f"{way}, {sparsity:.0%} left out", DEFAULT if dial else sparsity
                    points[name] = {
                        "way": way, "left_out": sparsity, "bytes": share_read(rows, made, sparsity) if rows else 1.0,
                    }  # fmt: skip
                    if sparsity == made:
                        points[name]["error"] = sum(row["error"] for row in rows) / max(1, len(rows))
                    options = common | {"path": folder / f"{way}.{i}", "dials": {dial: sparsity} if dial else None}
                    children.start(name, sys.executable, "trimtab_steps.py", **options)
                    points[name] |= children.about[name]
                    say(f"  {name}: perplexity {points[name]['perplexity']:.2f}")
        children.start("memory", sys.executable, PEERS / "memory_steps.py", size=MEMORY, threads=threads)
        say("timing")
        steps = interleave(children.steps, seconds=seconds, block=10, rest=REST_S)
    bandwidth = MEMORY / steps.pop("memory").median_ms / 1e6
    for name, timing in steps.items():
        points[name] |= {"median_ms": timing.median_ms, "samples": timing.samples}
    results = {
        "command": " ".join(sys.argv), "versions": package_versions(), "instructions": instruction_set(),
        "machine": this_machine(threads).model_dump(mode="json"), "model": model.name, "context": CONTEXT,
        "tokens": blocks * (TOKENS - 1), "memory_gb_s": bandwidth, "points": points,
        "minutes": (time.monotonic() - begun) / 60,
    }  # fmt: skip
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results, indent=1))
        return
    for name, point in points.items():
        print(f"{name:48} {point['bytes']:.2f} of the bytes, perplexity {point['perplexity']:8.2f}, "
              f"{point['median_ms']:.2f} ms a token")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
