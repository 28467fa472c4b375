"""Embeddings from a served build, by NVIDIA's client: python examples/triton/client.py [HOST:PORT] [MODEL]"""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.http as triton

SENTENCES = ("How do I sort a list?", "Sorting a list.", "Open a socket.")


def main(server: str, model: str) -> None:
    """Ask for all sentences in one request and print their cosines to the first."""
    client = triton.InferenceServerClient(server)
    texts = triton.InferInput("TEXT", [len(SENTENCES), 1], "BYTES")
    texts.set_data_from_numpy(np.array([[text.encode()] for text in SENTENCES], dtype=object))
    vectors = client.infer(model, [texts]).as_numpy("EMBEDDING")
    for sentence, vector in zip(SENTENCES, vectors, strict=True):
        print(f"{vectors[0] @ vector:.2f}  {sentence}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else "localhost:8000", given[1] if len(given) > 1 else "build")
