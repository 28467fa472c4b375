"""Passages in the order of a reranker's build: python examples/reranker/rank.py BUILD"""

from __future__ import annotations

import sys

import numpy as np

from trimtab.compiler import load

QUERY = "close socket"
PASSAGES = (
    "Read the configuration file and return its sections.",
    "Shut down the connection and free the socket.",
    "Sort the list in place and return None.",
    "Open a file and close it when the block ends.",
)


def main(build: str) -> None:
    """Print the passages, the best first."""
    engine = load(build)
    logits = engine.run(engine.tokenize([(QUERY, passage) for passage in PASSAGES]))["logits"][:, 0]
    scores = 1 / (1 + np.exp(-logits))
    for place in np.argsort(-scores):
        print(f"{scores[place]:.3f}  {PASSAGES[place]}")


if __name__ == "__main__":
    main(sys.argv[1])
