"""Draw accuracy against time from the results of ffsplit.py: python benchmarks/plot.py RESULTS.json docs/ffsplit.svg"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

SHAPE = (8, 48)


def main(results: Path, out: Path) -> None:
    """One dot per engine: milliseconds for 8 texts of 48 tokens against accuracy on the test set."""
    tasks = json.loads(results.read_text())["tasks"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 3.6), squeeze=False)
    for (name, found), axis in zip(tasks.items(), axes[0], strict=True):
        for precision, marker in (("fp32", "o"), ("int8", "s")):
            part = found["trained"][precision]
            times = {r["name"]: r["median_ms"] for r in part["runs"] if (r["batch"], r["tokens"]) == SHAPE}
            before = (times[f"dense-{precision}"], part["dense_accuracy_same_precision"])
            after = (times["compiled"], part["accuracy"])
            axis.plot(*zip(before, after, strict=True), color="0.8", zorder=0)
            axis.plot(*before, marker, color="0.5", label=f"dense {precision}")
            axis.plot(*after, marker, color="tab:blue", label=f"trimtab {precision}")
        axis.set(title=name, xlabel="ms for 8 x 48 tokens", ylabel="accuracy, %", xlim=(0, None))
        low, high = axis.get_ylim()
        axis.set_ylim(low - 1, high + 0.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
