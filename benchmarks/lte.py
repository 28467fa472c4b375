"""Learned routers (LTE) on real models, beside baselines without training; and the speed of a 7 B model's shapes.

python benchmarks/lte.py --encoders FOLDER --decoder FOLDER --json

Parts, each by itself with `--parts`:

- encoder: FOLDER/sst2 and FOLDER/agnews, of `trimtab train --method lte`, and FOLDER/sst2-dense ... of equal training
  without routers, where there are any; else they are compared with the checkpoints they began with.
- decoder: FOLDER/model, FOLDER/dense (equal training) and FOLDER/routed, on WikiText-2.
- shapes: layers of LLaMA2-7B with random weights and routers; what quality such a sparsity costs is the decoder's part.

Accuracy is of whole test sets, perplexity of a fixed slice of the validation text, each by the compiled engine. Shares
of neurons are of the tokens that are judged, without padding. Times are medians on two threads, all engines in turns.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from routing import decoder as of_decoder
from routing import encoder as of_encoder
from routing import shapes as of_shapes
from routing.curves import CURVES

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.speed import this_machine
from trimtab.plugins.library import instruction_set

HERE = Path(__file__).resolve().parent
PARTS = ("encoder", "decoder", "shapes")


def main(
    parts: Annotated[str, typer.Option(help="Some of encoder,decoder,shapes.")] = ",".join(PARTS),
    encoders: Annotated[Path | None, typer.Option(help="Folder with trained encoders.")] = None,
    decoder: Annotated[Path | None, typer.Option(help="Folder with model, dense and routed.")] = None,
    tasks: Annotated[str, typer.Option(help="Of the encoders.")] = ",".join(of_encoder.TOKENS),
    only: Annotated[str, typer.Option(help="Curves of the frontiers; none for times alone.")] = ",".join(
        curve.name for curve in CURVES
    ),
    texts: Annotated[int | None, typer.Option(help="Of a test set, at most; by default all.")] = None,
    blocks: Annotated[int, typer.Option(help="Of 256 tokens, that perplexity is measured on.")] = 24,
    layers: Annotated[int, typer.Option(help="Of the 7 B shapes.")] = 2,
    batch: Annotated[str, typer.Option(help="Batches of the 7 B shapes.")] = "1,2,4,8,16",
    precision: Annotated[str, typer.Option(help="Of the 7 B shapes: some of fp32,int8.")] = "fp32,int8",
    seconds: Annotated[float, typer.Option(help="Of timing, for each part and precision; 0 times nothing.")] = 60.0,
    shared: Annotated[Path, typer.Option(help="Folder with data/ and models/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    wanted, curves = parts.split(","), set(only.split(","))
    if not set(wanted) <= set(PARTS):
        sys.exit(f"--parts {parts}: some of {','.join(PARTS)}")

    def say(text: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {text}", file=sys.stderr, flush=True)

    start = time.monotonic()
    results: dict[str, Any] = {
        "command": " ".join(sys.argv), "versions": package_versions(), "instructions": instruction_set(),
        "machine": this_machine(2).model_dump(mode="json"), "missing": [],
    }  # fmt: skip
    for part, given in (("encoder", encoders), ("decoder", decoder)):
        if part in wanted and given is None:
            results["missing"].append(f"{part} (--{part}{'s' if part == 'encoder' else ''} FOLDER)")

    def keep() -> None:
        """What is measured so far."""
        results["minutes"] = (time.monotonic() - start) / 60
        if output:
            output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="trimtab-lte-") as folder:
        for task in tasks.split(",") if "encoder" in wanted and encoders is not None else ():
            results.setdefault("encoder", {})[task] = of_encoder.measure(
                task, shared, encoders, Path(folder), only=curves, texts=texts, seconds=seconds, say=say
            )
            keep()
        if "decoder" in wanted and decoder is not None:
            results["decoder"] = of_decoder.measure(
                decoder, shared, Path(folder), only=curves, blocks=blocks, seconds=seconds, say=say
            )
            keep()
        if "shapes" in wanted:
            sizes = [int(size) for size in batch.split(",")]
            results["shapes"] = of_shapes.measure(
                Path(folder), layers=layers, sizes=sizes, precisions=precision.split(","), seconds=seconds, say=say
            )
    keep()
    text = json.dumps(results, indent=1)
    if as_json:
        print(text)
    else:
        show(results)


def show(results: dict[str, Any]) -> None:
    """The same as tables."""
    for task, found in results.get("encoder", {}).items():
        if "dense_accuracy" in found:
            print(f"{task}: dense {found['dense_accuracy']:.2f} %, checkpoint {found['checkpoint_accuracy']:.2f} %")
        _show_curves(found, "accuracy")
        _show_engines(found.get("times", {}))
    if "decoder" in results:
        found = results["decoder"]
        if "dense_perplexity" in found:
            print(f"decoder: dense {found['dense_perplexity']:.3f} on {found['tokens']} tokens")
        _show_curves(found, "perplexity")
        _show_engines(found.get("times", {}))
    for row in results.get("shapes", {}).get("rows", []):
        print("  " + ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                               for key, value in row.items()))  # fmt: skip
    for what in results["missing"]:
        print(f"missing: {what}")


def _show_curves(found: dict[str, Any], score: str) -> None:
    for name, points in found["curves"].items():
        for point in points:
            mark = "*" if point["default"] else " "
            dials = ", ".join(f"{key} {value:g}" for key, value in point["dials"].items())
            print(f" {mark}{name:18} {point[score]:8.3f}  {point['neurons']:6.1%} of the neurons, "
                  f"{point['ffn']:6.1%} of the FFNs' multiply-adds  {dials}")  # fmt: skip


def _show_engines(found: dict[str, Any]) -> None:
    for name, row in found.get("engines", {}).items():
        print(f"  {name:28} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items() if value is not None))


if __name__ == "__main__":
    typer.run(main)
