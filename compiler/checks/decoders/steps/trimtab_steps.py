"""One token behind `context` others, by a build of trimtab, or by ONNX Runtime of a dense ONNX file.

Options: path, threads, context, vocabulary; dense (whether `path` is an ONNX file), batch, dials, text (a .npy file of
blocks, for their perplexity).
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from serve import serve, start
from text import perplexity, read

from trimtab.compiler import load
from trimtab.compiler.targets.base import Runner
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options

Dials = dict[str, np.ndarray]


def main(
    path: str,
    threads: int,
    context: int,
    vocabulary: int,
    dense: bool = False,
    batch: int = 1,
    dials: dict[str, float] | None = None,
    text: str | None = None,
) -> None:
    runner, feeds = opened(path, dense, threads, batch, dials or {})
    blocks, rows = read(text, vocabulary, 2 * context, batch)
    about: dict[str, object] = {}
    if blocks is not None:
        about["perplexity"] = perplexity_of(runner, blocks, feeds)
    generation = runner.steps(batch, context + 1)
    prompt, mask, tokens = rows[:, :context], np.ones((batch, context + 1), np.int64), cycle(rows[:, context:].T)
    generation.run(prompt, mask[:, :-1], feeds)
    serve(
        about,
        step=lambda: generation.run(next(tokens)[:, None], mask, feeds),
        prompt=lambda: runner.steps(batch, context + 1).run(prompt, mask[:, :-1], feeds),
    )


def opened(path: str, dense: bool, threads: int, batch: int, dials: dict[str, float]) -> tuple[Runner, Dials]:
    if dense:
        return OnnxRuntimeRunner(Path(path), session_options(threads, spinning=True)), {}
    engine = load(path, threads=threads, verify=False)
    return engine.runner, engine.manifest.all_dials.feeds(batch, dials)


def perplexity_of(runner: Runner, blocks: np.ndarray, feeds: Dials) -> float:
    steps, past = runner.steps(1, blocks.shape[1]), 0

    def begin() -> None:
        nonlocal steps, past
        steps, past = runner.steps(1, blocks.shape[1]), 0

    def append(token: int) -> np.ndarray:
        nonlocal past
        past += 1
        return steps.run(np.array([[token]]), np.ones((1, past), np.int64), feeds)[0, -1]

    return perplexity(blocks, begin, append)


if __name__ == "__main__":
    start(main)
