"""The tables of docs/benchmarks.md from what lte.py measured: python benchmarks/routing/tables.py RESULTS.json [...]"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "lte": "**learned routers (LTE)**", "moefication": "fitted routers (MoEfication)",
    "threshold": "threshold of activations (CATS, TEAL)", "topk": "predicted top-k (HiRE)",
}  # fmt: skip


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of several runs as those of one; what a later one measured again takes the place of the earlier."""
    whole: dict[str, Any] = {}
    for path in paths:
        whole = _over(whole, json.loads(path.read_text(encoding="utf-8")))
    return whole


def _over(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {key: _over(old[key], value) for key, value in new.items()
            if isinstance(value, dict) and isinstance(old.get(key), dict)}  # fmt: skip
    return old | new | both


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def frontier(found: dict[str, Any], name: str, score: str) -> str:
    """One row for each curve, at the sparsity that was asked for; the dense model first."""
    unit = " %" if score == "accuracy" else ""
    dense = found[f"dense_{score}"]
    label = "dense, equal training" if found["equal_training"] else "dense"
    rows = [[label, "100 %", "100 %", "100 %", f"{dense:.2f}{unit}", ""]]
    for curve, points in found["curves"].items():
        for point in points:
            if point["default"] and (point["dials"] or point is closest(points, found)):
                value = point[score]
                less = f"{point['beside']:+.2f}" if score == "accuracy" else f"{point['beside'] - 1:+.1%}"
                rows.append(
                    [
                        named(curve),
                        *(f"{point[key]:.1%}" for key in ("neurons", "ffn", "bytes")),
                        f"{value:.2f}{unit}",
                        less,
                    ]
                )
    return table([name, "neurons computed", "FFN multiply-adds", "FFN bytes", score, "beside dense"], rows)


def named(curve: str) -> str:
    """As tables call a curve."""
    first, _, rest = curve.partition(" + ")
    return NAMES.get(first, first) + (f", low-rank {rest}" if rest else "")


def closest(points: Sequence[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Of points without a dial the one nearest the density of training."""
    density = 1 - found["asked"]
    return min(points, key=lambda point: abs(point["neurons"] - density))


def engines(found: dict[str, Any], name: str) -> str:
    """Times, beside the dense engine of the same precision."""
    rows = []
    for engine, row in found["engines"].items():
        keys = [key for key in row if key.endswith(("ms", "ratio"))]
        rows.append([engine, *(f"{row[key]:.2f}" for key in keys)])
    head = max(found["engines"].values(), key=len)
    titles = [key.replace("_", " ") for key in head if key.endswith(("ms", "ratio"))]
    return table([name, *titles], [[*row, *[""] * (len(titles) + 1 - len(row))] for row in rows])


def shapes(found: dict[str, Any]) -> str:
    """Ratios by precision and batch, beside what the bytes allow."""
    rows = []
    for row in found["rows"]:
        first = [row["precision"], row["batch"], f"{found['union'][str(row['batch'])]:.0%}"]
        if "left_dense" in row:
            rows.append([*first, "left dense", "", "", ""])
            continue
        cells = [f"{row[f'{what}_ratio']:.2f} ({row[f'{what}_bound_ratio']:.2f})" for what in ("ffn", "stack")]
        times = [f"{row[f'stack_{name}_ms']:.1f}" for name in ("dense", "routed")]
        rows.append([*first, *cells, *times])
    head = [
        "weights",
        "batch",
        "union of the groups",
        "FFNs (by bytes)",
        "all layers (by bytes)",
        "dense ms",
        "routed ms",
    ]
    return table(head, rows)


def tables(results: dict[str, Any]) -> Iterator[str]:
    """All tables of a file."""
    for task, found in results.get("encoder", {}).items():
        if "dense_accuracy" in found:
            yield frontier(found, task, "accuracy")
        if "times" in found:
            yield engines(found["times"], f"{task}, {found['times']['shape']} tokens")
    if "decoder" in results:
        found = results["decoder"]
        if "dense_perplexity" in found:
            yield frontier(found, "SmolLM2-135M", "perplexity")
        if "times" in found:
            yield engines(found["times"], "SmolLM2-135M, a token")
    if "shapes" in results:
        yield shapes(results["shapes"])


if __name__ == "__main__":
    print("\n".join(tables(merged([Path(path) for path in sys.argv[1:]]))))
