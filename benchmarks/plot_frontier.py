"""Draw what ffn_frontier.py measured: python benchmarks/plot_frontier.py RESULTS.json docs/frontier.svg --learned FILE

Perplexity relative to the dense model, against the bytes of FFN weights that a token reads, and against its time.
Learned routers are those of `lte.py --parts decoder`, beside dense models of equal training; that run has no times of
these builds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, ScalarFormatter

MOST = 3.0  # times the dense perplexity: beyond, no one looks


def main(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What ffn_frontier.py wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
    learned: Annotated[Path | None, typer.Option(help="What lte.py --parts decoder wrote.")] = None,
) -> None:
    """Draw both pictures into one figure."""
    found = json.loads(results.read_text())
    points = list(found["points"].values())
    dense = next(point for point in points if point["way"] == "dense")
    ways = list(dict.fromkeys(point["way"] for point in points if point["way"] != "dense"))
    figure, (by_bytes, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for i, way in enumerate(ways):
        rows = [point for point in points if point["way"] == way]
        kept = [row for row in rows if row["perplexity"] <= MOST * dense["perplexity"]]
        above = [row["perplexity"] / dense["perplexity"] for row in kept]
        for axis, key in ((by_bytes, "bytes"), (by_time, "median_ms")):
            axis.plot([row[key] for row in kept], above, "o-", color=f"C{i}", label=way, markersize=4)
    if learned is not None:
        curve = json.loads(learned.read_text())["decoder"]["curves"]["lte"]
        rows = [row for row in curve if row["beside"] <= MOST]
        by_bytes.plot(
            [row["bytes"] for row in rows], [row["beside"] for row in rows], "k*-", label="learned routers (LTE)"
        )
    finish(by_bytes, 1.0, "bytes of FFN weights that a token reads")
    by_bytes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    by_bytes.set_ylabel("perplexity, of the dense model's")
    finish(by_time, dense["median_ms"], "ms a token")
    by_bytes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def finish(axis: Axes, dense: float, label: str) -> None:
    """A cross where the dense model is, and a perplexity axis that shows per cents near 1."""
    axis.plot(dense, 1.0, "kx", markersize=9, label="dense int8")
    axis.set(xlabel=label, yscale="log", ylim=(0.97, MOST))
    ticks: list[Any] = [1, 1.1, 1.25, 1.5, 2, 3]
    axis.set_yticks(ticks)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_formatter(lambda *_: "")
    axis.grid(alpha=0.3)


if __name__ == "__main__":
    typer.run(main)
