"""Texts become the tensors that the model's own tokenizer would make."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import ModelError


def test_rows_are_filled_up_on_the_right_and_cut(word_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(word_tokenizer, 4)
    found = tokenizer.encode(["w0", "w1 w2 zzz", "w3 w4 w5 w6 w7 w8"])
    np.testing.assert_array_equal(found["input_ids"], [[2, 0, 0, 0], [3, 4, 1, 0], [5, 6, 7, 8]])
    np.testing.assert_array_equal(found["attention_mask"], [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(found["token_type_ids"], np.zeros((3, 4)))
    assert all(array.dtype == np.int64 for array in found.values())
    assert tokenizer.encode(["w3 w4 w5"], 2)["input_ids"].tolist() == [[5, 6]]
    assert tokenizer.encode(["w3 w4 w5 w6 w7"], 100)["input_ids"].shape == (1, 4)
    assert load_tokenizer(word_tokenizer).encode(["w3 " * 50])["input_ids"].shape == (1, 50)


def test_no_texts_are_a_batch_that_an_engine_takes(tmp_path: Path, word_tokenizer: Path) -> None:
    batch = load_tokenizer(word_tokenizer).encode([])
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (0, 1))
    run = OnnxRuntimeRunner(zoo.exported("bert"))
    (output,) = run.run({name: batch[name] for name in run.inputs}).values()
    assert output.shape[0] == 0


@pytest.mark.parametrize(("settings", "config", "pad"), [
    ({"pad_token": "w7"}, {}, 9),
    ({"pad_token": {"content": "w8"}}, {}, 10),
    ({"eos_token": "w9"}, {"pad_token_id": 3}, 11),
    ({"pad_token": None}, {"pad_token_id": 3}, 3),
    ({"pad_token": "not in the vocabulary"}, {"pad_token_id": None}, 0),
])  # fmt: skip
def test_padding_token(word_tokenizer: Path, settings: dict[str, Any], config: dict[str, Any], pad: int) -> None:
    (word_tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    (word_tokenizer / "config.json").write_text(json.dumps(config))
    found = load_tokenizer(word_tokenizer).encode(["w0", "w1 w2"])
    np.testing.assert_array_equal(found["input_ids"], [[2, pad], [3, 4]])


def test_padding_saved_with_the_tokenizer_is_not_used(word_tokenizer: Path) -> None:
    saved = json.loads((word_tokenizer / "tokenizer.json").read_text())
    saved["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 5, "pad_type_id": 0, "pad_token": "w3",
    }  # fmt: skip
    saved["truncation"] = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    (word_tokenizer / "tokenizer.json").write_text(json.dumps(saved))
    assert load_tokenizer(word_tokenizer).encode(["w0", "w1 w2"])["input_ids"].tolist() == [[2, 0], [3, 4]]


def test_damaged_files(word_tokenizer: Path, tmp_path: Path) -> None:
    (word_tokenizer / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(word_tokenizer)
    (word_tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(word_tokenizer)


def test_without_transformers_a_tokenizer_json_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    says = f"the tokenizer in {tmp_path}, which has no tokenizer.json, needs transformers, which is not installed here"
    with pytest.raises(ModelError, match=says) as caught:
        load_tokenizer(tmp_path)
    assert "trimtab[huggingface]" in str(caught.value.hint)


def test_a_tokenizer_that_only_transformers_can_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ModelError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "able"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    found = load_tokenizer(tmp_path, 4).encode(["unable", "able", "able able able able"])
    expected = transformers.BertTokenizer.from_pretrained(tmp_path)(
        ["unable", "able", "able able able able"], padding=True, truncation=True, max_length=4, return_tensors="np"
    )
    assert found["input_ids"].tolist() == [[2, 5, 6, 3], [2, 7, 3, 0], [2, 7, 7, 3]]
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.shared
def test_same_as_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "models" / "sst2"
    texts = ["A fine film!", "Überraschend — 很好", "x " * 300, "it 's"]
    found = load_tokenizer(folder).encode(texts, 64)
    inner = transformers.AutoTokenizer.from_pretrained(folder)
    expected = inner(
        texts, padding="longest", truncation=True, max_length=64, pad_to_multiple_of=1, return_tensors="np"
    )
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])
