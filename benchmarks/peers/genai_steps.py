"""One token behind `context` others, by ONNX Runtime GenAI: genai_steps.py FOLDER THREADS CONTEXT VOCABULARY [TEXT.npy]

FOLDER is what its model builder wrote. Every step goes back to the same length and appends one token, which is the
generator's own loop without the choice of the token.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import text
from serve import serve


def main(folder: str, threads: int, context: int, vocabulary: int, *words: str) -> None:
    path = Path(folder) / "genai_config.json"
    config = json.loads(path.read_text())
    # Stopped spinning: or its idle threads would slow the engine whose turn comes next.
    options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
    config["model"]["decoder"]["session_options"] |= options
    path.write_text(json.dumps(config))

    model = genai.Model(folder)
    blocks, row = text.read([*words], vocabulary, 2 * context)
    about: dict[str, object] = {"version": importlib.metadata.version("onnxruntime-genai")}

    def generator(length: int) -> genai.Generator:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        return genai.Generator(model, parameters)

    def append(to: genai.Generator, tokens: np.ndarray) -> None:
        to.append_tokens(np.asarray(tokens, np.int32).reshape(1, -1))

    if blocks is not None:
        reading = generator(blocks.shape[1] + 1)

        def begin() -> None:
            nonlocal reading
            reading = generator(blocks.shape[1] + 1)

        def following(token: int) -> np.ndarray:
            append(reading, np.array([token]))
            return np.asarray(reading.get_logits())[0, -1]

        about["perplexity"] = text.perplexity(blocks, begin, following)
    stepping, tokens = generator(2 * context), cycle(row[context:])
    append(stepping, row[:context])

    def step() -> None:
        append(stepping, np.array([next(tokens)]))
        stepping.rewind_to(context)

    step()
    serve(about, step=step, prompt=lambda: append(generator(2 * context), row[:context]))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:])
