"""The results of `trimtab bench`: times of engines, their ratios, and the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from scipy.stats import gmean

from trimtab.compiler.checks.peers import DENSE, INT8

COMPILED = "compiled"
_INSTRUCTIONS = {
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm",
    "bf16", "sve",
}  # fmt: skip
"""Vector instruction sets, by Linux's names."""

KEYS = {DENSE: "vs_dense", INT8: "vs_int8"}
"""Peer → its key among the speedups; the key of any other peer is "vs_" and its name."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class TimedRun(_Result):
    """One engine at one shape.

    Attributes:
        name: "compiled", or the peer's name.
        tokens: tokens of a call; None for a model without tokens.
        past: tokens in the cache at a decoder's step; 0 for a prompt.
        median_ms, p95_ms: median and 95th percentile of one call, in milliseconds.
        samples: number of timed calls.
        memory_mb: RSS of a decoder's process in 10⁶ bytes: weights, cache, runtime and interpreter.
        ratio: median of this engine divided by the median of the compiled engine at this shape; above 1, compiled is
            faster.
    """

    name: str
    batch: int
    tokens: int | None
    median_ms: float
    p95_ms: float
    samples: int
    ratio: float
    past: int = 0
    memory_mb: float | None = None


class Machine(_Result):
    """The machine of a measurement.

    Attributes:
        instructions: vector instruction sets of the processor, on which the speed of matrix products depends.
    """

    cpu: str
    cores: int
    threads: int
    instructions: tuple[str, ...] = ()


class Bench(_Result):
    """The result of `trimtab bench`.

    Attributes:
        speedup: peer's key → speedup of the compiled engine over the peer, at the workload's opt shape, or at the last
            shape where the opt shape was not timed; for a decoder, in steps behind the usual prompt, or behind the
            last one. `vs_int8` is None where that peer did not run.
        geomean: peer's key → geometric mean of the speedup over all runs; for a decoder, over prompts and steps.
        like_for_like: key of the dense peer of the same precision.
        setting: dial → its value, for builds that have dials.
    """

    target: str
    machine: Machine
    versions: dict[str, str]
    runs: tuple[TimedRun, ...]
    speedup: dict[str, float | None]
    geomean: dict[str, float | None]
    like_for_like: str
    setting: dict[str, float] = {}

    @property
    def steps(self) -> tuple[TimedRun, ...]:
        """The steps of a decoder; empty for another model."""
        return tuple(run for run in self.runs if run.past)


def speedups(runs: Sequence[TimedRun]) -> dict[str, float | None]:
    """Peer's key → speedup of the compiled engine, the geometric mean over `runs`."""
    names = list(dict.fromkeys(run.name for run in runs if run.name != COMPILED))
    means = {key(name): float(gmean([run.ratio for run in runs if run.name == name])) for name in names}
    return dict.fromkeys(KEYS.values()) | means


def key(peer: str) -> str:
    """The peer's key among the speedups: "dense-fp32" → "vs_dense", "openvino-bf16" → "vs_openvino_bf16"."""
    return KEYS.get(peer, "vs_" + peer.replace("-", "_"))


def this_machine(threads: int) -> Machine:
    """The processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    cpu = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags", fields.get("Features", "")).split()
    instructions = tuple(sorted(_INSTRUCTIONS.intersection(flags)))
    return Machine(cpu=cpu, cores=os.cpu_count() or 1, threads=threads, instructions=instructions)
