"""One engine, many threads: every method answers each of them as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import zoo

from trimtab.compiler import compile_model, load
from trimtab.compiler.data import lazy_tokenizer
from trimtab.compiler.data import tokenizer as tokenizer_module
from trimtab.compiler.engine import Engine
from trimtab.compiler.generation import generate
from trimtab.compiler.generation.text import generate_text
from trimtab.compiler.sources import Source

THREADS = 8
SPARSE = [
    {"ffn-topk": {"density": 0.2, "recall": 0.8, "rank": 16, "most": 1.0, "dense_above": 8}},
    {"head-topk": {"take": 24, "rank": 12, "most": 1.0, "dense_above": 8}},
    {"weight-only": {"parts": ["attention"]}},
]


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What `calls` return, made by many threads at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda call: call(), calls))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build that takes texts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "tokenizer").mkdir()
    zoo._tokenizer(tiny.ROWS).save_pretrained(folder / "tokenizer")
    model = tiny.model(folder / "model.onnx")
    source = Source(origin="tiny", onnx=model, tokenizer=folder / "tokenizer", labels=None, max_tokens=64, kind="onnx")
    return compile_model(source, {"passes": []}, folder / "build").path


@pytest.fixture(scope="module", params=["dense", "sparse"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    data = folder / "data.txt"
    data.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(4, 130, 20)) for _ in range(40)))
    recipe = {
        "passes": SPARSE if request.param == "sparse" else [], "workload": {"batch": [1, 2, 4], "tokens": [1, 8, 24]},
        "calibration": {"states": 400}, "threads": 2,
    }  # fmt: skip
    model = zoo.save_pretrained("llama", folder / "model")
    return load(compile_model(model, recipe, folder / "build", data=data).path)


def test_texts_of_many_threads(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own texts and limit; the first calls of all parse the tokenizer, once."""
    parsed = []

    def counted(*arguments: Any) -> Any:
        parsed.append(arguments)
        return tokenizer_module.load_tokenizer(*arguments)

    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    asked = [
        ([" ".join(f"w{i}" for i in rng.integers(3, 40, rng.integers(1, 60))) for _ in range(3)], int(limit))
        for limit in rng.integers(3, 60, 120)
    ]
    alone, engine = load(texts), load(texts)
    wanted = []
    for given, limit in asked:
        feeds = alone.tokenize(given, limit)
        wanted.append((feeds, alone.run(feeds)))
    monkeypatch.setattr(lazy_tokenizer, "load_tokenizer", counted)
    found = together(
        [lambda g=given, n=limit: (f := engine.tokenize(g, n), engine.run(f)) for given, limit in asked]  # type: ignore[misc]
    )
    assert len(parsed) == 1
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])


def test_generations_of_many_threads(decoder: Engine) -> None:
    """Caches, sparse kernels and decoding at the same time as plain runs."""
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    asked = [rng.integers(3, 130, (rng.integers(1, 4), rng.integers(1, 12))).tolist() for _ in range(24)]
    spoken = [" ".join(f"w{i}" for i in rng.integers(4, 130, rng.integers(1, 8))) for _ in range(8)]
    feeds = [_feeds(decoder, int(tokens), token) for token, tokens in enumerate(rng.integers(1, 20, 16), 3)]
    calls: list[Callable[[], Any]] = [
        *(lambda p=prompts: np.stack(list(generate(decoder.runner, p, max_new_tokens=6))) for prompts in asked),
        *(lambda f=given: decoder.run(f)["logits"] for given in feeds),
        *(lambda t=text: list(generate_text(decoder, [t], max_tokens=5))[-1][0].tokens for text in spoken),
    ]
    wanted = [call() for call in calls]
    order = rng.permutation(len(calls))
    for place, answer in zip(order, together([calls[i] for i in order]), strict=True):
        np.testing.assert_allclose(answer, wanted[place], rtol=0, atol=1e-5)


def _feeds(engine: Engine, tokens: int, token: int) -> dict[str, np.ndarray]:
    """Inputs of a decoder for one row of the same token, without a past."""
    sizes, feeds = {"batch": 1, "past": 0}, {}
    for tensor in engine.inputs:
        shape = [n if isinstance(n, int) else sizes.get(str(n), tokens) for n in tensor.shape or ()]
        feeds[tensor.name] = np.ones(shape, tensor.dtype)
    return feeds | {"input_ids": token * feeds["input_ids"]}
