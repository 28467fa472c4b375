"""One token behind `context` others, by a build of trimtab: trimtab_steps.py BUILD THREADS CONTEXT VOCABULARY"""

from __future__ import annotations

import sys

import numpy as np
from serve import serve

from trimtab.compiler import load


def main(build: str, threads: int, context: int, vocabulary: int) -> None:
    steps = load(build, threads=threads, verify=False).runner.steps(1, context + 1)
    rng = np.random.default_rng(0)
    steps.run(rng.integers(0, vocabulary, (1, context)), np.ones((1, context), np.int64))
    mask = np.ones((1, context + 1), np.int64)
    serve(lambda: steps.run(rng.integers(0, vocabulary, (1, 1)), mask), {})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
