"""The crossover of a layer: where its sparse form stops being faster in ONNX Runtime.

It is measured on this machine and stored in the cache.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.checks.timing import interleave
from trimtab.compiler.targets.kernels import has_kernel
from trimtab.compiler.targets.sparse_trials import dense_model, random_blocks, random_layers, sparse_model
from trimtab.passes.crossover import MAX_TOKENS, Call, Crossover, Load, SparseShape
from trimtab.passes.hashing import hash_bytes
from trimtab.passes.ort_errors import opening, running
from trimtab.passes.sparse_ffn.rows import RowForm
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins.library import instruction_set, library_path, register

log = logging.getLogger(__name__)

_BYTES = 1 << 27  # bytes of dense weights in a trial: more than the CPU's caches can hold
_DENSITIES = (0.05, 0.4)
_TOKENS = (1, 2, 4, 8, 16, 32)
_SECONDS = 2.0  # per trial
_CHOICES = 8  # choices of blocks; runs alternate between them, so that no CPU cache holds the rows

Options = Callable[[], ort.SessionOptions]


def measured_crossover(shape: SparseShape, options: Options) -> Crossover:
    """The crossover of `shape`, from the cache, else measured now, which takes some seconds.

    Args:
        options: returns the options of each session, threads among them.
    """
    shape, measured = replace(shape, tokens=min(shape.tokens, MAX_TOKENS)), []

    def make(part: Path) -> None:
        measured.append(measure(shape, options))
        log.info("%s: %s", shape, measured[0])
        part.write_text(json.dumps(asdict(measured[0])), encoding="utf-8")

    path = entry("crossovers", f"{_key(shape, options().intra_op_num_threads)}.json", make)
    if measured:
        return measured[0]
    kept = json.loads(path.read_text(encoding="utf-8"))
    together = tuple((tokens, time) for tokens, time in kept["together"])
    return Crossover(**kept | {"together": together, "call": Call(**kept["call"]) if kept["call"] else None})


def measure(shape: SparseShape, options: Options) -> Crossover:
    """Time both forms of layers of this shape: as many layers as the model has, up to `_BYTES` of dense weights."""
    rng, blocks = np.random.default_rng(0), shape.rows // shape.block
    bytes_of_one = 4 * shape.rows * shape.width * shape.matrices
    layers = 1 if shape.matrices == 1 else max(1, min(shape.layers, _BYTES // bytes_of_one))
    weights = random_layers(shape.rows, shape.width, shape.matrices, layers)

    def states(tokens: int) -> dict[str, np.ndarray]:
        return {"x": rng.standard_normal((1, tokens, shape.width), np.float32)}

    def inputs(tokens: int, k: int, *, same: bool = False) -> list[dict[str, np.ndarray]]:
        """k blocks for each token; with `same`, all tokens choose the same k blocks."""

        def choice() -> np.ndarray:
            if k == blocks:
                return np.arange(blocks, dtype=np.int32)[None]
            return random_blocks(rng, tokens, blocks, k)[np.arange(tokens) * (not same)]

        x = states(tokens)
        return [x | {f"blocks{i}": choice() for i in range(layers)} for _ in range(_CHOICES)]

    with temporary_folder("crossover") as folder:
        native = shape.dense == "int4-blocks" and has_kernel("Int4Linear")
        dense = _session(dense_model(weights, folder / "dense.onnx", shape.dense, native=native), options)
        sparse = _session(
            sparse_model(weights, folder / "sparse.onnx", shape.block, cast("RowForm", shape.form)), options
        )
        del weights
        few, many = (max(1, round(density * blocks)) for density in _DENSITIES)

        def timed(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
            return {name: each.median_ms / layers for name, each in interleave(runs, seconds=_SECONDS).items()}

        one = timed({"dense": _turns(dense, [states(1)])} | {str(k): _turns(sparse, inputs(1, k)) for k in (few, many)})
        together = timed({str(tokens): _turns(sparse, inputs(tokens, blocks)) for tokens in _TOKENS})
        call = None
        if shape.tokens > 1:
            choices = {"apart": inputs(shape.tokens, many), "whole": inputs(shape.tokens, blocks)}
            choices |= {str(k): inputs(shape.tokens, k, same=True) for k in (few, many)}
            several = timed(
                {"dense": _turns(dense, [states(shape.tokens)])}
                | {name: _turns(sparse, choice) for name, choice in choices.items()}
            )
            fixed, full = _line(few / blocks, several[str(few)], many / blocks, several[str(many)])
            load = Load.of_call(np.full(blocks, many / blocks), shape.tokens)
            more = max(several["apart"] - several[str(many)], 0.0) / max(load.union - load.density, 1e-6)
            read = min(more, full)
            call = Call(shape.tokens, several["dense"], several["whole"], fixed, read, full - read)
    fixed, full = _line(few / blocks, one[str(few)], many / blocks, one[str(many)])
    points = tuple((tokens, together[str(tokens)]) for tokens in _TOKENS)
    return Crossover(one["dense"], fixed, full, points, shape.dense, call)


def _line(few: float, less: float, many: float, longer: float) -> tuple[float, float]:
    """The time of no rows, and the further time of all rows, from the times of two shares of the rows."""
    full = max((longer - less) / max(many - few, 1e-6), 1e-6)
    return max(less - full * few, 0.0), full


def _session(path: Path, options: Options) -> ort.InferenceSession:
    settings = options()
    register(settings)
    with opening("a trial of sparse layers"):
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _turns(session: ort.InferenceSession, feeds: list[dict[str, np.ndarray]]) -> Callable[[], object]:
    """A call that runs the model on the next of `feeds`, in turn."""
    turn = count()

    def run() -> None:
        with running("a trial of sparse layers"):
            session.run(None, feeds[next(turn) % len(feeds)])

    return run


def _key(shape: SparseShape, threads: int) -> str:
    library = library_path()
    kernels = [instruction_set(), file_hash(library) if library else None]
    parts = [asdict(shape), threads, ort.__version__, *kernels, _processor()]
    return hash_bytes(json.dumps(parts, sort_keys=True))[:32]


def _processor() -> str:
    """Name of the processor: machines of several kinds may share a home folder, and with it the cache."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
