"""Draw what ffsplit.py measured: python benchmarks/plot.py RESULTS.json [RESULTS.json ...] docs/ffsplit.svg

One row per task: accuracy against FFN bytes, and accuracy against time for 8 texts of 48 tokens.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

STYLES = {
    "dense": ("black", "o"),
    "int8": ("tab:gray", "s"), "int4": ("tab:olive", "D"), "int2": ("tab:brown", "v"), "svd": ("tab:red", "^"),
    "drop": ("tab:orange", "x"), "ffsplit": ("tab:blue", "o"), "ffsplit + int8": ("tab:cyan", "o"),
}  # fmt: skip
SHAPE = (8, 48)
BELOW = 9  # points under the dense accuracy that are still shown


def main(
    results: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="What ffsplit.py wrote.")],
    out: Annotated[Path, typer.Argument(help="The SVG to write.")],
) -> None:
    """Draw the frontiers of all tasks in `results` into one figure."""
    tasks: dict[str, dict[str, Any]] = {}
    for path in results:
        for name, found in json.loads(path.read_text())["tasks"].items():
            trained = tasks.setdefault(name, {}).get("trained", {}) | found.get("trained", {})
            tasks[name] |= found | ({"trained": trained} if trained else {})
    figure, axes = plt.subplots(len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False)
    for (name, found), (left, right) in zip(tasks.items(), axes, strict=True):
        draw_size(left, found)
        draw_time(right, found)
        for axis in (left, right):
            axis.axhline(found["dense_accuracy"], color="0.7", linewidth=0.8, zorder=0)
            axis.set_ylim(found["dense_accuracy"] - BELOW, found["dense_accuracy"] + 1)
            axis.set(title=name, ylabel="accuracy, %")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def draw_size(axis: Axes, found: dict[str, Any]) -> None:
    """Bytes of the FFNs on disk against accuracy, without any training."""
    draw_curves(axis, [(row["curve"], row["ffn_bytes"], row["accuracy"]) for row in found.get("size", [])])
    axis.set_xlabel("FFN bytes, of fp32 (no training)")
    axis.set_xscale("log")
    axis.set_xticks([0.0625, 0.125, 0.25, 0.5], minor=False)
    axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axis.xaxis.set_minor_formatter("")


def draw_time(axis: Axes, found: dict[str, Any]) -> None:
    """Time of a run as a share of the dense fp32 engine's in the same run, against accuracy; stars were trained."""
    points = []
    for row in found.get("time", []):
        times = row["median_ms"]["{}x{}".format(*SHAPE)]
        points.append((row["curve"], times["compiled"] / times["dense-fp32"], row["accuracy"]))
    draw_curves(axis, points)
    for precision, curve, dense in (("fp32", "ffsplit", "dense"), ("int8", "ffsplit + int8", "int8")):
        part = found.get("trained", {}).get(precision)
        if part is None:
            continue
        times = {run["name"]: run["median_ms"] for run in part["runs"] if (run["batch"], run["tokens"]) == SHAPE}
        share, peer = (times[name] / times["dense-fp32"] for name in ("compiled", f"dense-{precision}"))
        color, marker = STYLES[dense]
        axis.plot(peer, part["dense_accuracy_same_precision"], marker, color=color, label=f"dense {precision}")
        label = f"{curve}, {part['training']['minutes']:.0f} min trained"
        axis.plot(share, part["accuracy"], "*", color=STYLES[curve][0], markersize=12, label=label)
    axis.set(xlabel=f"time for {SHAPE[0]} x {SHAPE[1]} tokens, of dense fp32", xlim=(0, None))


def draw_curves(axis: Axes, points: list[tuple[str, float, float]]) -> None:
    """Points (curve, cost, accuracy), those of a curve joined."""
    for curve, group in groupby(points, key=lambda point: point[0]):
        _, cost, accuracy = zip(*sorted(group), strict=True)
        color, marker = STYLES[curve]
        axis.plot(cost, accuracy, marker=marker, color=color, label=curve, linewidth=1, markersize=5)


if __name__ == "__main__":
    typer.run(main)
