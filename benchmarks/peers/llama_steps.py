"""One token behind `context` others, by llama.cpp: llama_steps.py MODEL.gguf THREADS CONTEXT VOCABULARY

Runs in an interpreter that has llama-cpp-python; the calls are those of llama.h.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import random
import sys

import llama_cpp as api
from serve import serve


@api.llama_log_callback
def quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp tells every tensor otherwise."""


def main(path: str, threads: int, context: int, vocabulary: int) -> None:
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 2 * context, context, context
    options.n_threads = options.n_threads_batch = threads
    session = api.llama_init_from_model(model, options)

    def decode(count: int) -> None:
        tokens = (api.llama_token * count)(*(random.randrange(3, vocabulary) for _ in range(count)))
        code = api.llama_decode(session, api.llama_batch_get_one(tokens, count))
        assert code == 0, f"llama_decode: {code}"
        assert api.llama_get_logits(session)

    def step() -> None:
        decode(1)
        api.llama_memory_seq_rm(api.llama_get_memory(session), 0, context, -1)

    decode(context)
    step()
    system = ctypes.string_at(api.llama_print_system_info()).decode()
    serve(step, {"version": importlib.metadata.version("llama-cpp-python"), "system": system})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
