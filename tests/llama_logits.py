"""What llama.cpp makes of a GGUF file: python llama_logits.py OUT.json KIND=MODEL.gguf...

Writes its logits behind IDS. llama_logits.json has those of the files that test_gguf.py makes of SEED. Runs in an
interpreter that has llama-cpp-python:

    python -m venv llama && llama/bin/pip install llama-cpp-python
    python -m pytest tests/compiler/test_gguf.py -k as_llama_cpp --basetemp=/tmp/gguf  # makes the files
    llama/bin/python tests/llama_logits.py tests/llama_logits.json F32=/tmp/gguf/.../F32.gguf ...
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

SEED = 16
IDS = [5, 260, 17, 17, 99, 3, 140, 201, 8, 64, 33, 250]


def main(out: str, *files: str) -> None:
    import llama_cpp
    import numpy as np

    found: dict[str, object] = {"llama-cpp-python": importlib.metadata.version("llama-cpp-python"), "ids": IDS}
    for each in files:
        kind, path = each.split("=")
        model = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, n_threads=2)
        model.eval(IDS)
        found[kind] = [float(f"{value:.5g}") for value in np.array(model.scores[len(IDS) - 1])]
    with open(out, "w", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
