"""Perplexity is torch's loss, on the tokens that are no padding; what is generated is judged as it is generated."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from scipy.special import log_softmax
from seeds import seeded

from trimtab.compiler import compile_model
from trimtab.compiler.checks.decoded import as_decoded
from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.checks.validate import validate
from trimtab.passes.errors import DataError


def test_equals_torch_on_texts_of_any_length() -> None:
    model, rng = zoo.tiny_model("llama"), seeded()
    rows = [rng.integers(3, 131, length) for length in (12, 3, 1, 7)]
    total, tokens, feeds = 0.0, 0, []
    for pair in (rows[:2], rows[2:]):
        ids, mask = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
        for i, row in enumerate(pair):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        feeds.append({"input_ids": ids, "attention_mask": mask})
    for row in rows:
        if len(row) > 1:
            with torch.no_grad():
                loss = model(input_ids=torch.tensor(row[None]), labels=torch.tensor(row[None])).loss.item()
            total, tokens = total + loss * (len(row) - 1), tokens + len(row) - 1

    def dense(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"logits": model(**{k: torch.from_numpy(v) for k, v in feed.items()}).logits.numpy()}

    def worse(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": dense(feed)["logits"] * 2}

    found = measure_perplexity(feeds, dense, worse)  # type: ignore[arg-type]
    assert (found.samples, found.tokens) == (4, tokens)
    assert found.dense == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert found.agreement == 1 and found.compiled != pytest.approx(found.dense)
    expected = 0.0
    for feed in feeds:
        real = feed["attention_mask"][:, 1:] != 0
        p, q = (log_softmax(run(feed)["logits"][:, :-1][real].astype(float), -1) for run in (dense, worse))
        expected += (np.exp(p) * (p - q)).sum()
    assert found.divergence == pytest.approx(expected / tokens, rel=1e-4)


def test_nothing_to_predict_is_said() -> None:
    feed = {"input_ids": np.ones((2, 1), np.int64), "attention_mask": np.ones((2, 1), np.int64)}
    with pytest.raises(DataError, match="two tokens"):
        measure_perplexity([feed], lambda f: {"logits": np.zeros((2, 1, 5))}, lambda f: {"logits": np.zeros((2, 1, 5))})


def test_a_sparse_build_is_judged_as_it_generates(tmp_path: Path) -> None:
    """A whole text goes the dense way through it, and would show no difference."""
    rng = seeded()
    text = "\n".join(" ".join(f"w{i}" for i in rng.integers(4, 131, rng.integers(5, 20))) for _ in range(40))
    (tmp_path / "texts.txt").write_text(text)
    source = zoo.save_pretrained("llama", tmp_path / "model")
    recipe = {
        "passes": [{"ffn-topk": {"density": 0.1, "take": 0.15, "rank": 8, "dense_above": 1}}],
        "workload": {"batch": [1, 1, 4], "tokens": [1, 8, 32]}, "threads": 1,
    }  # fmt: skip
    build = compile_model(source, recipe, tmp_path / "build", data=tmp_path / "texts.txt")
    found = validate(build, data=tmp_path / "texts.txt", samples=20)
    assert found.passed is None and not found.failures
    quality = found.quality
    assert quality is not None and quality.kind == "perplexity"
    assert quality.agreement < 1 and quality.divergence > 1e-4
    whole = [error.relative_l2 for error in found.comparisons if "tokens 32" in error.where]
    assert whole and all(error is not None and error < 1e-4 for error in whole)


def test_a_dense_build_is_judged_as_it_is(tmp_path: Path) -> None:
    source = zoo.save_pretrained("llama", tmp_path / "model")
    build = compile_model(source, {"passes": [], "threads": 1}, tmp_path / "build")
    assert as_decoded(build) is None
