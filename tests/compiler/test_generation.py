"""Generation: the tokens that transformers finds, draws as they should fall, texts that stop where they should."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from clear import clear_prompts
from scipy.special import softmax
from seeds import seeded
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.cli.app import app
from trimtab.compiler.generation import NONE, Sampling, generate
from trimtab.compiler.generation.text import generate_text
from trimtab.compiler.targets.base import Steps
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.dials import Dials
from trimtab.passes.errors import InputError

RECIPE = {"passes": [], "workload": {"batch": [1, 1, 4], "tokens": [1, 8, 32]}, "threads": 1}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    source = zoo.save_pretrained("llama", folder / "model")
    return compile_model(source, RECIPE, folder / "build").path


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_greedy_tokens_are_those_of_transformers(family: str) -> None:
    model, rng = zoo.tiny_model(family), seeded()
    runner = OnnxRuntimeRunner(zoo.exported(family, "cached"))
    prompts = clear_prompts(runner, (7, 1, 4), 12, (3, model.config.vocab_size), rng)
    found = np.stack(list(generate(runner, prompts, max_new_tokens=12)), 1)
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            wanted = model.generate(
                torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
        assert tokens.tolist() == wanted


@dataclass
class Spelled(Steps):
    """Expects of each row the tokens of its script, in turn."""

    scripts: list[list[int]]
    at: int = -1

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        self.at += 1
        logits = np.zeros((*input_ids.shape, 10), np.float32)
        for row, script in enumerate(self.scripts):
            logits[row, :, script[min(self.at, len(script) - 1)]] = 9
        return logits


def spelled(*scripts: list[int]) -> Any:
    return SimpleNamespace(steps=lambda batch, length: Spelled(list(scripts)))


def test_rows_end_one_by_one() -> None:
    runner = spelled([5, 2, 5], [5, 6, 7, 3, 5], [1, 1, 1, 1, 2])
    found = np.stack(list(generate(runner, [[1], [1], [1]], max_new_tokens=9, stop={2, 3})), 1)
    assert found.tolist() == [[5, 2, NONE, NONE, NONE], [5, 6, 7, 3, NONE], [1, 1, 1, 1, 2]]


def test_the_context_bounds_the_answer() -> None:
    runner = spelled([4])
    assert len(list(generate(runner, [[1, 2, 3]], max_new_tokens=99, context=8))) == 5
    with pytest.raises(InputError, match="the prompt has 8 tokens, and the model takes 8"):
        next(generate(runner, [[1] * 8], max_new_tokens=9, context=8))
    with pytest.raises(InputError, match="no tokens"):
        next(generate(runner, [[1], []], max_new_tokens=9))


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 5, "top_p": 0.8}], ids=str)
def test_draws_fall_as_they_should(options: dict[str, float]) -> None:
    rng, temperature = seeded(), 0.7
    logits = rng.standard_normal(8).astype(np.float32) * 2
    sampling = Sampling(temperature=temperature, **options)
    kept = np.argsort(-logits)[: int(options.get("top_k", 8))]
    p = softmax(logits[kept].astype(float) / temperature)
    nucleus = np.cumsum(p) - p < options.get("top_p", 1)
    wanted = np.zeros(8)
    wanted[kept[nucleus]] = p[nucleus] / p[nucleus].sum()
    np.testing.assert_allclose(sampling.probabilities(logits[None])[0], wanted, atol=1e-12)
    draws = sampling.next(np.broadcast_to(logits, (20000, 8)), rng)
    share = np.bincount(draws, minlength=8) / 20000
    assert share[wanted == 0].sum() == 0
    np.testing.assert_allclose(share, wanted, atol=0.02)


def test_a_seed_repeats_an_answer(build: Path) -> None:
    engine = load(build, threads=1)

    def answer(seed: int) -> list[int]:
        *_, last = generate_text(engine, ["w5 w6"], max_tokens=12, sampling=Sampling(temperature=1.5, seed=seed))
        return last[0].tokens

    assert answer(1) == answer(1)
    assert len({tuple(answer(seed)) for seed in range(5)}) > 1


def test_pieces_make_the_text(build: Path) -> None:
    engine = load(build, threads=1)
    pieces = [answers[0].new for answers in generate_text(engine, ["w5 w6 w7"], max_tokens=6)]
    *_, (answer,) = generate_text(engine, ["w5 w6 w7"], max_tokens=6)
    assert "".join(pieces) == answer.text
    assert answer.text.split() == [f"w{token}" for token in answer.tokens if token > 3]
    assert answer.ended in ("length", "stop")


class Letters:
    """A tokenizer whose tokens are bytes."""

    end_ids = frozenset({0})
    pad_id = 0

    def prompts(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


def spell(text: str, **options: Any) -> tuple[list[str], Any]:
    """The pieces, and the answer, of an engine that says `text` and then ends."""

    class Says(Spelled):
        def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
            self.at += 1
            logits = np.zeros((*input_ids.shape, 256), np.float32)
            logits[..., self.scripts[0][self.at]] = 9
            return logits

    engine: Any = SimpleNamespace(
        runner=SimpleNamespace(steps=lambda batch, length: Says([[*text.encode(), 0]])), tokenizer=Letters(),
        manifest=SimpleNamespace(max_tokens=None, vocabulary=None, all_dials=Dials()),
    )  # fmt: skip
    pieces, answer = [], None
    for (answer,) in generate_text(engine, ["?"], **options):
        pieces.append(answer.new)
    return pieces, answer


def test_half_a_character_waits_for_the_other() -> None:
    pieces, answer = spell("aé€🙂")
    assert "".join(pieces) == answer.text == "aé€🙂"
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "🙂"]
    assert answer.ended == "stop"


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [(["END"], "a E EN b "), (["zzz"], "a E EN b END c"), (["b END", " E"], "a"), (["c"], "a E EN b END ")],
)
def test_stop_texts_are_cut_and_never_shown(stop: list[str], wanted: str) -> None:
    pieces, answer = spell("a E EN b END c", stop=stop)
    assert "".join(pieces) == answer.text == wanted
    assert answer.ended == "stop"


@pytest.mark.parametrize("stop", ["END", None, [1], [b"END"], [""], ["END", ""], {"END": 1}, 3])
def test_stops_that_are_no_texts(build: Path, stop: Any) -> None:
    """A string would stop at each of its letters, and an empty text before the first token."""
    with pytest.raises(InputError, match="stop "):
        next(generate_text(load(build), ["w5"], stop=stop))


@pytest.mark.parametrize("temperature", [1e-320, 5e-324, 1e-300])
def test_the_smallest_temperatures_take_the_likeliest(temperature: float) -> None:
    logits = seeded().normal(0, 20, (7, 90)).astype(np.float32)
    with np.errstate(all="raise", under="ignore"):
        for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
            drawn = Sampling(temperature=temperature, **options).next(logits, seeded())
            np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_what_looked_like_a_stop_comes_out_at_the_end() -> None:
    pieces, answer = spell("ab EN", stop=["END"], max_tokens=5)
    assert "".join(pieces) == answer.text == "ab EN"
    assert answer.ended == "length"


def test_command_streams_one_answer_and_prints_several(build: Path) -> None:
    one = cli("generate", build, "--prompt", "w5 w6", "--max-new-tokens", 4)
    assert one.exit_code == 0, one.stderr
    assert "4 tokens" in one.stderr
    both = cli("generate", build, "--prompt", "w5 w6", "--prompt", "w9", "--max-new-tokens", 4, "--json")
    answers = json.loads(both.stdout)["answers"]
    assert [a["prompt"] for a in answers] == ["w5 w6", "w9"]
    assert answers[0]["text"] == one.stdout
    assert all(len(a["tokens"]) == 4 or a["ended"] == "stop" for a in answers)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--prompt", " ".join(["w5"] * 70)), 1, "and the model takes 64"),
        (("--prompt", "w5", "--top-p", "0"), 2, "0..1"),
        (("--prompt", "w5", "--temperature", "-1"), 2, "temperature"),
        (("--prompt", "w5", "--stop", ""), 1, "stop holds ''"),
        ((), 2, "--prompt"),
    ],
)
def test_bad_input(build: Path, words: tuple[str, ...], code: int, says: str) -> None:
    found = cli("generate", build, *words)
    assert found.exit_code == code and says in found.stderr
    assert "Traceback" not in found.stderr


def test_a_build_that_does_not_generate(tmp_path: Path) -> None:
    source = zoo.save_pretrained("bert", tmp_path / "model")
    build = compile_model(source, RECIPE, tmp_path / "build")
    found = cli("generate", build.path, "--prompt", "w5")
    assert found.exit_code == 1 and "no cache" in found.stderr


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (["ab"], "prompt 0 is not a list of token ids"),
        ([[3, 4], [1.5]], "prompt 1 is not a list of token ids"),
        ([[[3, 4]]], "prompt 0 is not a list"),
        ([[3, -1]], r"prompt 0 holds the token -1, the model's tokens are 0 to 49"),
        ([[3], [4, 50]], r"prompt 1 holds the token 50"),
        ([[3], []], "no tokens"),
    ],
)
def test_prompts_that_are_none(prompts: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        next(generate(SimpleNamespace(), prompts, max_new_tokens=4, vocabulary=50))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -3, 1.5, "4", None])
def test_no_tokens_to_generate(count: Any) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens is {count!r}, not an integer of at least 1"):
        next(generate(SimpleNamespace(), [[3]], max_new_tokens=count))  # type: ignore[arg-type]


def test_prompts_of_texts_are_lists_of_strings(build: Path) -> None:
    engine = load(build)
    assert engine.manifest.vocabulary == zoo.tiny_model("llama").config.vocab_size
    for wrong in ("w1 w2", None, [None], [("a", "b")]):
        with pytest.raises(InputError):
            next(generate_text(engine, wrong))  # type: ignore[arg-type]
