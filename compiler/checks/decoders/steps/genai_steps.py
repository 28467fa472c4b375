"""One token behind `context` others, by ONNX Runtime GenAI.

Options: path (the folder that its model builder wrote), threads, context, vocabulary; text (a .npy file of blocks, for
their perplexity). Every step rewinds to the same length and appends one token: the generator's own loop without the
choice of the token.
"""

from __future__ import annotations

import importlib.metadata
import json
from itertools import cycle

import numpy as np
import onnxruntime_genai as genai
from serve import serve, start
from text import perplexity, read


def main(path: str, threads: int, context: int, vocabulary: int, text: str | None = None) -> None:
    # Threads must not spin: idle spinning threads would slow the engine whose turn comes next.
    session_options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
    config = genai.Config(path)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
    model = genai.Model(config)
    blocks, (row,) = read(text, vocabulary, 2 * context)
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

        about["perplexity"] = perplexity(blocks, begin, following)
    stepping, tokens = generator(context + 1), cycle(row[context:])
    append(stepping, row[:context])

    def step() -> None:
        append(stepping, np.array([next(tokens)]))
        stepping.rewind_to(context)

    step()
    serve(about, step=step, prompt=lambda: append(generator(context + 1), row[:context]))


if __name__ == "__main__":
    start(main)
