"""How long a text the positions of a model allow: as ONNX Runtime itself takes it and does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zoo
from seeds import seeded

from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import PassContext
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.limits import Positions
from trimtab.passes.graph.positions import find_positions


def positions(path: Path) -> Positions | None:
    graph = load_graph(path)
    Canonicalize().run(graph, PassContext())
    return find_positions(graph)


@pytest.mark.parametrize(
    ("family", "exporter", "padding"),
    [
        ("bert", "dynamo", True), ("bert", "torchscript", True), ("distilbert", "dynamo", True),
        ("roberta", "dynamo", False), ("opt", "dynamo", False), ("gpt2", "dynamo", True),
    ],
)  # fmt: skip
def test_a_text_of_all_positions_runs_and_a_longer_one_does_not(family: str, exporter: str, padding: bool) -> None:
    found = positions(zoo.exported(family, exporter))
    assert found is not None and found.padding == padding
    run = OnnxRuntimeRunner(zoo.exported(family, exporter))

    def answer(tokens: int, real: int) -> None:
        feeds = {name: value for name, value in zoo.feeds(family, 1, tokens, rng).items() if name in run.inputs}
        feeds["input_ids"] = rng.integers(5, 40, (1, tokens))
        feeds["attention_mask"][:] = np.arange(tokens) < real
        if family == "roberta":
            feeds["input_ids"][:, real:] = zoo.tiny_model(family).config.pad_token_id
        assert found.longest(feeds) == (tokens if padding else real)
        run.run(feeds)

    rng = seeded()
    answer(found.most, found.most)
    for tokens, real in [(found.most + 1, found.most + 1), (2 * found.most, 2 * found.most)]:
        with pytest.raises(TargetError):
            answer(tokens, real)
    if padding:
        with pytest.raises(TargetError):
            answer(found.most + 1, found.most)
    else:
        answer(found.most + 9, found.most)


def test_attention_that_looks_up_the_angles_itself() -> None:
    """A file of GenAI's builder: past and new tokens together have as many positions as the table has rows."""
    path = zoo.exported("llama", "genai")
    assert positions(path) == Positions(zoo.TEXT, padding=True)
    run, rng = OnnxRuntimeRunner(path), seeded()

    def answer(tokens: int, past: int) -> None:
        cache = {name: np.zeros((1, 2, past, 16), np.float32) for name in run.inputs if name.startswith("past")}
        ids, mask = rng.integers(5, 40, (1, tokens)), np.ones((1, past + tokens), np.int64)
        run.run({"input_ids": ids, "attention_mask": mask, **cache})

    for past in (0, 20):
        answer(zoo.TEXT - past, past)
        with pytest.raises(TargetError):
            answer(zoo.TEXT + 1 - past, past)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "t5", "vit"])
def test_other_models_have_no_limit(family: str) -> None:
    assert positions(zoo.exported(family)) is None


def test_a_past_has_positions() -> None:
    """Of tokens, and not of the holes that padding has left in it."""
    found = positions(zoo.exported("gpt2", "cached"))
    assert found == Positions(zoo.tiny_model("gpt2").config.n_positions, padding=True)
    mask = np.ones((2, 9), np.int64)
    mask[:, 2:4] = 0
    feeds = {"input_ids": np.zeros((2, 3), np.int64), "past_key_values.0.key": np.zeros((2, 5, 6, 8), np.float32)}
    assert found.longest(feeds) == 9 and found.longest(feeds | {"attention_mask": mask}) == 7
