"""One token behind `context` others, by llama.cpp.

Options: path (a GGUF file), threads, context, vocabulary; text (a .npy file of blocks, for their perplexity).
Runs in an interpreter that has llama-cpp-python; the calls are those of llama.h.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Sequence
from itertools import cycle

import llama_cpp as api
import numpy as np
from serve import serve, start
from text import perplexity, read


@api.llama_log_callback
def quiet(level: int, message: bytes, data: object) -> None:
    """Drop the log: llama.cpp writes a line for every tensor."""


def main(path: str, threads: int, context: int, vocabulary: int, text: str | None = None) -> None:
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    blocks, (row,) = read(text, vocabulary, 2 * context)
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    vocabulary_of_file = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    if vocabulary_of_file != vocabulary:
        raise SystemExit(f"{path} has {vocabulary_of_file} tokens, and the build {vocabulary}: the models differ")
    parameters = api.llama_context_default_params()
    parameters.n_ctx = max(2 * context, 0 if blocks is None else blocks.shape[1])
    parameters.n_batch = parameters.n_ubatch = context
    parameters.n_threads = parameters.n_threads_batch = threads
    session = api.llama_init_from_model(model, parameters)
    if not session:
        raise SystemExit(f"llama.cpp has no room for {parameters.n_ctx} tokens of {path}")

    def decode(tokens: Sequence[int]) -> np.ndarray:
        ids = (api.llama_token * len(tokens))(*map(int, tokens))
        code = api.llama_decode(session, api.llama_batch_get_one(ids, len(tokens)))
        assert code == 0, f"llama_decode: {code}"
        return np.ctypeslib.as_array(api.llama_get_logits(session), (vocabulary,))

    def cut(length: int) -> None:
        api.llama_memory_seq_rm(api.llama_get_memory(session), 0, length, -1)

    def step() -> None:
        decode([next(tokens)])
        cut(context)

    def prompt() -> None:
        cut(0)
        decode(row[:context])

    about = {
        "version": importlib.metadata.version("llama-cpp-python"),
        "system": ctypes.string_at(api.llama_print_system_info()).decode(),
    }
    if blocks is not None:
        about["perplexity"] = perplexity(blocks, lambda: cut(0), lambda token: decode([token]))
    tokens = cycle(row[context:])
    prompt()
    step()
    serve(about, step=step, prompt=prompt)


if __name__ == "__main__":
    start(main)
