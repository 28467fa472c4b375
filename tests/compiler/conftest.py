"""Fixtures of the compiler's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    """Folder of a tokenizer whose words are w0 (token 2) to w99 (token 101); 0 is padding, 1 is any other word."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(100)}}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    return folder
