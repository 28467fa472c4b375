"""Draw what topk_training.py measured: python benchmarks/plot_topk.py RESULTS.json docs/topk.svg

One picture per model: perplexity against the share of neurons kept for each token, before and after fine-tuning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter, ScalarFormatter


def main(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What topk_training.py wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
) -> None:
    """Draw the curves of all models in `results` into one figure."""
    models = json.loads(results.read_text())["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.6), squeeze=False)
    for axis, (name, found) in zip(axes[0], models.items(), strict=True):
        curves = [("as it was", "tab:gray", found["untrained"])]
        curves += [
            (f"fine-tuned to {row['density']:.0%}", "tab:blue", row["perplexity"]) for row in found["fine_tuned"]
        ]
        for label, color, points in curves:
            axis.plot([float(density) for density in points], list(points.values()), "o-", color=color, label=label)
        for row in found["fine_tuned"]:
            axis.plot(row["density"], row["engine"], "*", color="tab:red", markersize=11, label="compiled")
        axis.axhline(found["untrained"]["1.0"], color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=name, xlabel="neurons kept for each token", ylabel="perplexity", xscale="log", yscale="log")
        axis.set_xticks([float(density) for density in found["untrained"]], minor=False)
        axis.xaxis.set_minor_formatter(lambda *_: "")
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
