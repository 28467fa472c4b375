"""What `trimtab bench` finds: the times of engines, beside each other, and where they were measured."""

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
"""As Linux names them."""

KEYS = {DENSE: "vs_dense", INT8: "vs_int8"}
"""Peer → its key among the speedups; another peer's is its own name after "vs_"."""


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class TimedRun(_Result):
    """One engine at one shape.

    Attributes:
        name: "compiled", or the peer's.
        tokens: None for a model without them.
        past: of a decoder's step, the tokens in the cache; 0 is a prompt.
        median_ms, p95_ms: of one call, in milliseconds.
        samples: calls timed.
        memory_mb: of a decoder, what its process holds: weights, cache, runtime and interpreter, in 10⁶ bytes.
        ratio: its median over that of the compiled engine at this shape: above 1, compiled is faster.
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
    """Where it was measured.

    Attributes:
        instructions: the vector instruction sets of the processor that decide how fast matrix products are.
    """

    cpu: str
    cores: int
    threads: int
    instructions: tuple[str, ...] = ()


class Bench(_Result):
    """What was measured.

    Attributes:
        speedup: how many times as fast as each peer the compiled engine is, at the workload's opt shape, or at the
            last shape where that was not timed; of a decoder, in steps behind the usual prompt, or the last one.
            `vs_int8` is None where that peer was not run.
        geomean: the geometric mean over all runs, of a decoder those of prompts and of steps.
        like_for_like: the key of the dense peer of the same precision.
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
        """Of a decoder; empty for another model."""
        return tuple(run for run in self.runs if run.past)


def speedups(runs: Sequence[TimedRun]) -> dict[str, float | None]:
    """Peer's key → how many times as fast compiled is, as the geometric mean over `runs`."""
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
