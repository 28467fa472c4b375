"""All of it from Python: python examples/python-api/program.py MODEL TEXTS

TEXTS is a folder with texts.txt and unseen.txt, as ../texts.py writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trimtab.compiler import calibrate_model, compile_model, inspect_model, load, open_source
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.data import read_data
from trimtab.passes.errors import TrimtabError

RECIPE = {
    "passes": [{"ffn-split": {"budget": {"time": 0.8}}}, "unpad", {"dynamic-int8": {"scales": "auto"}}],
    "workload": {"batch": [1, 8, 32], "tokens": [8, 48, 128]},
}


def main(model: str, texts: Path) -> None:
    """Inspect, calibrate, compile, check, run."""
    parts = inspect_model(model)
    print(f"{parts['family']}, {parts['layers']} layers, {parts['params'] / 1e6:.1f} M parameters")

    profile = calibrate_model(open_source(model), read_data(texts / "texts.txt"), samples=256)
    build = compile_model(model, RECIPE, "python-build", profile=profile)
    print(f"weights: {build.manifest.sizes.compiled_bytes / build.manifest.sizes.dense_bytes:.0%} of dense")

    checked = validate(build, data=texts / "unseen.txt", samples=100)
    assert checked.quality is not None
    print(*checked.quality.lines(), sep="\n")

    engine = load("python-build")  # verifies the hash of every file
    sentences = ["How do I sort a list?", "Sorting a list.", "Open a socket."]
    question, answer, other = engine.run(engine.tokenize(sentences))["sentence_embedding"]
    print(f"cosine with the question: answer {question @ answer:.2f}, another sentence {question @ other:.2f}")

    try:
        compile_model(model, {"passes": ["ffn-splt"]}, "never")
    except TrimtabError as error:  # whatever a caller can cause is one of these
        print(f"error: {error.message}; hint: {error.hint}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
