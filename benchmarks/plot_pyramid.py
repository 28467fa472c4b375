"""Draw what pyramid.py measured: python benchmarks/plot_pyramid.py RESULTS.json [RESULTS.json ...] docs/pyramid.svg

One row per task: accuracy against wall clock of texts one by one and in batches of 32, and where tokens and samples of
"both" leave.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, ScalarFormatter

STYLES = {
    "dense-fp32": ("black", "o"), "dense-int8": ("black", "s"), "openvino-fp32": ("tab:gray", "o"),
    "openvino-bf16": ("tab:gray", "D"), "unpad": ("tab:olive", "o"), "prune": ("tab:green", "v"),
    "exit": ("tab:orange", "^"), "both": ("tab:blue", "o"), "both + ffn-split": ("tab:cyan", "o"),
    "int8": ("tab:brown", "s"), "both, int8": ("tab:blue", "s"), "static int8": ("tab:pink", "D"),
    "both, static int8": ("tab:purple", "D"),
}  # fmt: skip


def main(
    results: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="What pyramid.py wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
) -> None:
    """Draw all tasks in `results` into one figure."""
    figure, axes = plt.subplots(len(results), 3, figsize=(13, 3.6 * len(results)), squeeze=False)
    for path, row in zip(results, axes, strict=True):
        found = json.loads(path.read_text())
        for axis, size in zip(row, (1, 32), strict=False):
            draw_times(axis, found, size)
        draw_leaving(row[2], found)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def draw_times(axis: Axes, found: dict[str, Any], size: int) -> None:
    """Times as fast as dense fp32 against accuracy."""
    engines = found["engines"]
    for name, engine in engines.items():
        color, marker = STYLES[name]
        axis.plot(engine[f"vs_fp32_{size}"], engine["accuracy"], marker, color=color, label=name)
    dense = engines["dense-fp32"]["accuracy"]
    axis.axhline(dense, color="0.7", linewidth=0.8, zorder=0)
    axis.axhline(dense - 0.5, color="0.7", linewidth=0.8, linestyle=":", zorder=0)
    axis.set(title=f"{found['task']}, {size} at a time", xlabel="times as fast as dense fp32", ylabel="accuracy, %")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.grid(alpha=0.3)
    if size == 1:
        axis.legend(fontsize=6)


def draw_leaving(axis: Axes, found: dict[str, Any]) -> None:
    """What share of samples and of their tokens is still there behind each layer, at the dials of "both"."""
    samples: list[tuple[int, float]] = [(0, 1.0)]
    tokens: list[tuple[int, float]] = []
    whole = 0
    for passage in found["engines"]["both"]["passages"]:
        number = re.search(r"\.(\d+)/", passage["where"])  # of the layers before an exit, or of the layer that prunes
        assert number is not None
        if passage["what"] == "samples":
            whole = whole or passage["entered"]
            samples.append((int(number[1]), passage["stayed"] / whole))
        else:
            tokens.append((int(number[1]) + 1, passage["stayed"] / max(passage["entered"], 1)))
    axis.step(*zip(*samples, strict=True), where="post", label="samples that go on")
    axis.plot(*zip(*tokens, strict=True), "o-", label="of the tokens that enter a layer, those that stay")
    axis.set(title=f"{found['task']}, both", xlabel="layers", ylim=(0, 1.05))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    typer.run(main)
