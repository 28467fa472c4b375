"""One token behind `context` others, by ONNX Runtime GenAI: genai_steps.py FOLDER THREADS CONTEXT VOCABULARY

FOLDER is what its model builder wrote. Every step goes back to the same length and appends one token, which is the
generator's own loop without the choice of the token.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from serve import serve


def main(folder: str, threads: int, context: int, vocabulary: int) -> None:
    path = Path(folder) / "genai_config.json"
    config = json.loads(path.read_text())
    # Stopped spinning: or its idle threads would slow the engine whose turn comes next.
    options = {"intra_op_num_threads": threads, "session.force_spinning_stop": "1"}
    config["model"]["decoder"]["session_options"] |= options
    path.write_text(json.dumps(config))

    model = genai.Model(folder)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=2 * context, do_sample=False)
    generator = genai.Generator(model, parameters)
    rng = np.random.default_rng(0)
    generator.append_tokens(rng.integers(3, vocabulary, (1, context)).astype(np.int32))

    def step() -> None:
        generator.append_tokens(rng.integers(3, vocabulary, (1, 1)).astype(np.int32))
        generator.rewind_to(context)

    step()
    serve(step, {"version": importlib.metadata.version("onnxruntime-genai")})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
