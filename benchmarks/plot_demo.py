"""Draw what the demo measured: python benchmarks/plot_demo.py build/demo/demo.json minilm.svg

Time of a call against the embeddings' mean cosine to the dense ones, for each engine at two shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt

_ENGINES = {
    "dense-fp32": ("dense fp32", "tab:gray"),
    "ort-int8-default": ("ONNX Runtime int8, its default options", "tab:orange"),
    "dense-int8": ("ONNX Runtime int8, our options", "tab:olive"),
    "compiled": ("trimtab", "tab:blue"),
}
_SHAPES = ((1, 48), (32, 48))


def main(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `make demo` wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
) -> None:
    """Draw the engines of `results` into one figure."""
    measured = json.loads(results.read_text())
    quality = {name: each["mean_cosine"] for name, each in measured["quality"]["peers"].items()}
    quality |= {"dense-fp32": 1.0, "compiled": measured["quality"]["quality"]["mean_cosine"]}
    figure, axes = plt.subplots(1, len(_SHAPES), figsize=(9, 2.9), sharey=True)
    for axis, (batch, tokens) in zip(axes, _SHAPES, strict=True):
        for run in measured["speed"]["runs"]:
            if (run["batch"], run["tokens"]) == (batch, tokens) and run["name"] in _ENGINES:
                label, color = _ENGINES[run["name"]]
                axis.plot(run["median_ms"], quality[run["name"]], "o", color=color, markersize=9, label=label)
        axis.set(title=f"{batch} x {tokens} tokens", xlabel="ms per call")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(min(0.95, *quality.values()) - 0.005, 1.005)
    axes[0].set_ylabel("mean cosine to dense")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
