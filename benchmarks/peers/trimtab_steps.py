"""One token behind `context` others, by trimtab: trimtab_steps.py BUILD THREADS CONTEXT VOCABULARY [TEXT.npy]"""

from __future__ import annotations

import sys
from itertools import cycle

import numpy as np
import text
from serve import serve

from trimtab.compiler import load


def main(build: str, threads: int, context: int, vocabulary: int, *words: str) -> None:
    engine = load(build, threads=threads, verify=False)
    dials = engine.manifest.all_dials.feeds(1, {})
    blocks, row = text.read([*words], vocabulary, 2 * context)
    about: dict[str, object] = {}
    if blocks is not None:
        steps, past = engine.runner.steps(1, blocks.shape[1]), 0

        def begin() -> None:
            nonlocal steps, past
            steps, past = engine.runner.steps(1, blocks.shape[1]), 0

        def append(token: int) -> np.ndarray:
            nonlocal past
            past += 1
            return steps.run(np.array([[token]]), np.ones((1, past), np.int64), dials)[0, -1]

        about["perplexity"] = text.perplexity(blocks, begin, append)
    following = engine.runner.steps(1, context + 1)
    prompt, mask, tokens = row[None, :context], np.ones((1, context + 1), np.int64), cycle(row[context:])
    following.run(prompt, mask[:, :-1], dials)
    serve(
        about,
        step=lambda: following.run(np.array([[next(tokens)]]), mask, dials),
        prompt=lambda: engine.runner.steps(1, context + 1).run(prompt, mask[:, :-1], dials),
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
