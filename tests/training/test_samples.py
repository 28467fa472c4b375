"""Training batches: little padding, every sample once an epoch, labels beside the texts they belong to."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import tiny
from seeds import seeded

from trimtab.compiler.data import read_data
from trimtab.compiler.sources import Source
from trimtab.passes.errors import DataError
from trimtab.training.samples import NO_LABEL, Samples, read_samples

INPUTS = [gs.Variable(name, np.int64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")]


def samples_of(
    records: list[dict[str, object]], tokenizer: Path, folder: Path, labels: tuple[str, ...] | None = None
) -> Samples:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    source = Source("m", tiny.model(folder / "model.onnx"), tokenizer, labels, 64, "onnx")
    rng = seeded()
    return read_samples(read_data(path), source, INPUTS, max_tokens=64, rng=rng)


def test_batches_are_of_like_numbers_of_tokens(word_tokenizer: Path, tmp_path: Path) -> None:
    wordy = [{"text": " ".join(["w1"] * 20)} for _ in range(40)]  # 20 tokens, 59 characters
    terse = [{"text": "x" * 59} for _ in range(40)]  # one token of as many characters
    samples = samples_of(wordy + terse, word_tokenizer, tmp_path)
    batches = list(islice(samples.epochs(8, seeded()), 10))
    padded = sum(np.count_nonzero(batch.feeds["attention_mask"] == 0) for batch in batches)
    assert sum(len(batch) for batch in batches) == 76
    assert padded <= 19 * 7  # at most one batch has both kinds


def test_an_epoch_has_every_sample_once_with_its_label(word_tokenizer: Path, tmp_path: Path) -> None:
    names = ("even", "odd")
    records = [{"text": f"w{i}", "label": names[i % 2] if i % 3 == 0 else i % 2} for i in range(90)]
    records += [{"text": f"w{i}"} for i in range(90, 100)]
    samples = samples_of(records, word_tokenizer, tmp_path, names)
    seen = {}
    for batch in [*islice(samples.epochs(9, seeded()), 11), *samples.judged(10)]:
        seen |= dict(zip(batch.feeds["input_ids"][:, 0] - 2, batch.labels, strict=True))
    assert seen == {i: i % 2 if i < 90 else NO_LABEL for i in range(100)}


def test_a_label_that_the_model_does_not_know_is_named(word_tokenizer: Path, tmp_path: Path) -> None:
    records = [{"text": "w1", "label": "even"}, {"text": "w2", "label": "prime"}]
    with pytest.raises(DataError, match="label 'prime' is no class of the model; the model's are even, odd"):
        samples_of(records, word_tokenizer, tmp_path, ("even", "odd"))
