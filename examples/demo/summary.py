"""The demo's last table: the build beside the engines that a user would otherwise run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.compiler.builds.build import open_build
from trimtab.compiler.checks.peers import ort, ort_default, peer_model
from trimtab.compiler.checks.speed import Machine
from trimtab.compiler.cli.bench import describe as describe_machine

COMPILED, DENSE, DEFAULT, OURS = "compiled", "dense-fp32", "ort-int8-default", "dense-int8"
PEERS = (DEFAULT, OURS)
_ENGINES = {
    DENSE: "dense fp32",
    DEFAULT: "ORT int8 (its defaults)",
    OURS: "ORT int8 (our options)",
    COMPILED: "trimtab",
}


def sizes(build: Path) -> dict[str, int]:
    """Engine → bytes of its ONNX file on disk."""
    made = open_build(build)
    model = peer_model(made)
    files = {
        DENSE: model.export(),
        DEFAULT: ort_default.quantized(model.export()),
        OURS: ort.quantized(model.canonical),
        COMPILED: made.path / "model" / "model.onnx",
    }
    return {
        name: sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*")) for name, path in files.items()
    }


def describe(quality: dict[str, Any], speed: dict[str, Any], size: dict[str, int]) -> str:
    """The machine, the table, and a sentence on what it means.

    Args:
        quality: what `trimtab validate --json` prints.
        speed: what `trimtab bench --json` prints.
        size: bytes on disk of each engine.
    """
    rows = [["", *_ENGINES.values()]]
    for batch, tokens in dict.fromkeys((run["batch"], run["tokens"]) for run in speed["runs"]):
        timed = {
            run["name"]: run["median_ms"] for run in speed["runs"] if (run["batch"], run["tokens"]) == (batch, tokens)
        }
        rows.append([f"ms at {batch} x {tokens} tokens", *(f"{timed[name]:.2f}" for name in _ENGINES)])
    rows.append(["MB on disk", *(f"{size[name] / 1e6:.1f}" for name in _ENGINES)])
    judged = {COMPILED: quality["quality"], DENSE: {"mean_cosine": 1.0, "neighbour_overlap": 1.0}, **quality["peers"]}
    rows.append(["mean cosine, unseen texts", *(f"{judged[name]['mean_cosine']:.4f}" for name in _ENGINES)])
    rows.append(["10 neighbours kept", *(f"{judged[name]['neighbour_overlap']:.1%}" for name in _ENGINES)])
    machine = describe_machine(Machine.model_validate(speed["machine"]))
    return "\n".join([machine, "", *_aligned(rows), "", _meaning(speed, judged[COMPILED], judged[OURS])])


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _meaning(speed: dict[str, Any], ours: dict[str, float], int8: dict[str, float]) -> str:
    def faster(peer: str) -> str:
        ratios = [run["ratio"] for run in speed["runs"] if run["name"] == peer]
        key = {DENSE: "vs_dense", OURS: "vs_int8"}.get(peer, "vs_" + peer.replace("-", "_"))
        return f"{speed['geomean'][key]:.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"

    return (
        f"The build is {faster(DEFAULT)} as fast as ONNX Runtime's dynamic int8 with its default options, "
        f"{faster(OURS)} with ours,\nand {faster(DENSE)} as fast as dense fp32. Its embeddings have a mean cosine of "
        f"{ours['mean_cosine']:.3f} to the dense ones, where dense int8 has {int8['mean_cosine']:.3f}."
    )
