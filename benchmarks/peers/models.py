"""Models of the peers, of the shape that a Hugging Face configuration gives."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent


def with_tokenizer(checkpoint: Path, vocabulary: int, folder: Path) -> Path:
    """`folder`: the checkpoint with a tokenizer, without which GenAI's builder does not finish."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    if not (folder / "tokenizer.json").exists():
        words = {f"w{i}": i for i in range(vocabulary)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def genai_bytes(folder: Path, sizes: Mapping[str, int]) -> int:
    """Of the weights that a token needs, in what GenAI's builder wrote."""
    size = (folder / "model.onnx.data").stat().st_size
    shared = b"GatherBlockQuantized" in (folder / "model.onnx").read_bytes()  # table and head are one
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
