"""Draw what lte.py measured: python benchmarks/plot_lte.py RESULTS.json [RESULTS.json ...] docs/lte.svg

One row for each model: accuracy or perplexity over the share of neurons that is computed, and over the FFNs'
multiply-adds, of a decoder over the bytes that a token reads, what chooses neurons included. The last row has the
shapes of a 7 B model: times as fast as dense, by batch, with what the bytes allow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, ScalarFormatter
from routing.tables import merged

STYLES = {
    "lte": ("tab:blue", "o", "learned routers (LTE)"),
    "moefication": ("tab:orange", "s", "fitted routers (MoEfication)"),
    "threshold": ("tab:green", "^", "threshold of activations (CATS, TEAL)"),
    "topk": ("tab:gray", "v", "predicted top-k (HiRE), untrained"),
    "lte + rest": ("tab:cyan", "o", "learned routers, low-rank rest"),
    "moefication + rest": ("tab:red", "s", "fitted routers, low-rank rest"),
    "threshold + rest": ("tab:olive", "^", "threshold, low-rank rest"),
}
PRECISIONS = {"fp32": "tab:blue", "int8": "tab:orange"}
SHOWN = {"accuracy": (-12.0, 2.0), "perplexity": (0.95, 1.6)}


def main(
    results: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="What lte.py wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
) -> None:
    """Draw all that `results` have into one figure."""
    found = merged(results)
    rows = [(name, each, "accuracy") for name, each in found.get("encoder", {}).items()]
    rows += [("WikiText-2, SmolLM2-135M", found["decoder"], "perplexity")] if "decoder" in found else []
    many = len(rows) + ("shapes" in found)
    figure, axes = plt.subplots(many, 2, figsize=(10, 3.6 * many), squeeze=False)
    for (name, each, score), pair in zip(rows, axes, strict=False):
        for axis, share in zip(pair, ("neurons", "bytes" if score == "perplexity" else "ffn"), strict=True):
            draw_frontier(axis, name, each, score, share)
    if "shapes" in found:
        for axis, what in zip(axes[-1], ("ffn", "stack"), strict=True):
            draw_shapes(axis, found["shapes"], what)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def draw_frontier(axis: Axes, name: str, found: dict[str, Any], score: str, share: str) -> None:
    """Curves of a model; a star where the sparsity is that of training."""
    for curve, points in found["curves"].items():
        color, marker, label = STYLES[curve]
        points = sorted(points, key=lambda point: point[share])
        axis.plot([p[share] for p in points], [p["beside"] for p in points], marker=marker, color=color, label=label,
                  linewidth=1, markersize=4)  # fmt: skip
        for point in points:
            if point["default"] and curve == "lte":
                axis.plot(point[share], point["beside"], "*", color=color, markersize=13)
    exact = 0.0 if score == "accuracy" else 1.0
    axis.axhline(exact, color="0.7", linewidth=0.8, zorder=0)
    axis.axhline(found["wanted"]["beside"], color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axis.set_ylim(*SHOWN[score])
    beside = "points of accuracy beside dense" if score == "accuracy" else "times the dense perplexity"
    what = {"neurons": "neurons computed", "ffn": "FFN multiply-adds, routers included",
            "bytes": "FFN bytes of a token in fp32, routers included"}[share]  # fmt: skip
    axis.set(title=f"{name}, dense {found[f'dense_{score}']:.2f}", xlabel=what, ylabel=beside, xlim=(0, 1.05))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    if share == "neurons":
        axis.legend(fontsize=7, loc="lower right" if score == "accuracy" else "upper right")


def draw_shapes(axis: Axes, found: dict[str, Any], what: str) -> None:
    """Times as fast as dense by batch, and what the bytes allow (dashed); 1 where the compile leaves all FFNs dense."""
    for precision, color in PRECISIONS.items():
        rows = [row for row in found["rows"] if row["precision"] == precision]
        if rows:
            sizes = [row["batch"] for row in rows]
            axis.plot(sizes, [row.get(f"{what}_ratio", 1.0) for row in rows], "o-", color=color, label=precision)
            bound = [row.get(f"{what}_bound_ratio", 1.0) for row in rows]
            axis.plot(sizes, bound, "--", color=color, linewidth=0.8, label=f"{precision}, by bytes")
    axis.axhline(1, color="0.7", linewidth=0.8, zorder=0)
    axis.axhline(found["wanted_at_batch_1"][f"{what}_ratio"], color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    title = "FFNs" if what == "ffn" else "whole layers"
    axis.set(title=f"LLaMA2-7B shapes, {title}", xlabel="batch", ylabel="times as fast as dense", xscale="log")
    axis.set_xticks(sorted({row["batch"] for row in found["rows"]}), minor=False)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    typer.run(main)
