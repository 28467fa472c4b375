"""Models of the peers, of the shape that a Hugging Face configuration gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peers.child import HERE


def genai_model(checkpoint: Path, sizes: Mapping[str, int], folder: Path) -> int:
    """`folder`/model, by ONNX Runtime GenAI's model builder: int4 in blocks of 32.

    Returns:
        bytes of weights that a token needs.
    """
    from tokenizers import Tokenizer, models

    given = folder / "given"  # the checkpoint, and a tokenizer, without which the builder does not finish
    given.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (given / path.name).symlink_to(path)
    if not (given / "tokenizer.json").exists():
        words = {f"w{i}": i for i in range(sizes["vocab_size"])}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(given / "tokenizer.json"))
        (given / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", given, "-o", folder / "model", "-p", "int4",
        "-e", "cpu", "-c", folder / "cache", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4",
    ]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"onnxruntime-genai's builder: {run.stderr}")
    size = (folder / "model" / "model.onnx.data").stat().st_size
    shared = b"GatherBlockQuantized" in (folder / "model" / "model.onnx").read_bytes()  # table and head are one
    return size if shared else size - 4 * sizes["vocab_size"] * sizes["hidden_size"]


def llama_model(python: Path, form: str, sizes: Mapping[str, int], out: Path) -> int:
    """The file `out` for llama.cpp in Q8_0 or Q4_0: blocks of 32 with a scale in half precision.

    Args:
        python: an interpreter that has the package `gguf`.

    Returns:
        bytes of weights that a token needs.
    """
    config = out.with_suffix(".json")
    config.write_text(json.dumps(dict(sizes)))
    subprocess.run([python, HERE / "write_gguf.py", out, form, config], check=True)
    table = sizes["vocab_size"] * sizes["hidden_size"] * {"Q8_0": 34, "Q4_0": 18}[form] // 32
    return out.stat().st_size - table
