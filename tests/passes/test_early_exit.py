"""early-exit: each sample has the answer of the first exit that is sure of it, whatever else is in the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from packed_encoder import Encoder, exit_logits
from rewrite import session
from scipy.special import softmax

from trimtab.passes import PassContext, run_passes
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.errors import NotLearnedError, PassError, RecipeError
from trimtab.passes.graph import save_graph
from trimtab.passes.profile import Profile, ProfileInfo

KINDS = ["light", "first", "fastbert"]
CLEAR = 1e-3
"""Doubt that no rounding takes across the threshold."""


class Case:
    """A random encoder with exits behind some numbers of layers."""

    def __init__(self, kind: str, after: tuple[int, ...] = (0, 1, 2, 3), **sizes: int) -> None:
        self.seed = int(np.random.default_rng().integers(1 << 30))
        print(f"seed {self.seed}")
        self.encoder, self.kind, self.after = Encoder(self.seed, **sizes), kind, after
        self.exits = {name: w for number in after for name, w in self.encoder.exit(number, kind).items()}
        tensors = {f"learned.magic-pyramid.{name}": w for name, w in self.exits.items()}
        self.profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1), tensors)

    def compiled(self, folder: Path, **options: Any) -> Any:
        graph = self.encoder.graph()
        (result,) = run_passes(graph, [EarlyExit(**options)], PassContext(self.profile))
        assert result.changed == len(options.get("after") or self.after) and not result.left
        save_graph(graph, folder / "model.onnx")
        onnx.checker.check_model(folder / "model.onnx", full_check=True)
        return session(folder / "model.onnx")

    def doubts(self, answers: list[np.ndarray], criterion: str) -> list[float]:
        if criterion == "patience":
            found, classes = [], [answer.argmax() for answer in answers]
            for place, chosen in enumerate(classes):
                alike = next((i for i in range(place + 1) if classes[place - i] != chosen), place + 1)
                found.append(1 / alike)
            return found
        shares = [softmax(answer) for answer in answers]
        if criterion == "probability":
            return [1 - float(share.max()) for share in shares]
        return [float(-(share * np.log(share)).sum() / np.log(len(share))) for share in shares]

    def wanted(self, x: np.ndarray, threshold: float, criterion: str) -> tuple[np.ndarray, int, float]:
        """The answer of one sample, the layers that it runs, and how near to the threshold a decision was."""
        states = self.encoder.states(x)
        answers = [exit_logits(self.exits, states[number], number, self.kind) for number in self.after]
        doubts = self.doubts(answers, criterion)
        near = min(abs(doubt - threshold) for doubt in doubts)
        for number, answer, doubt in zip(self.after, answers, doubts, strict=True):
            if doubt < threshold:
                return answer, number, near
        return self.encoder.logits(states[-1]), self.encoder.layers, near

    def samples(self, count: int) -> list[np.ndarray]:
        rng = self.encoder.rng
        return [2 * rng.standard_normal((int(rng.integers(1, 9)), self.encoder.width)) for _ in range(count)]


def feeds(samples: list[np.ndarray], width: int, thresholds: Any) -> dict[str, np.ndarray]:
    rows = np.concatenate([np.zeros((0, width)), *samples])
    lengths = np.array([len(sample) for sample in samples], np.int32)
    limits = np.full(len(samples), thresholds, np.float32)
    return {"lengths": lengths, "x": rows.astype(np.float32), "exit_threshold": limits}


@pytest.mark.parametrize("criterion", ["entropy", "probability", "patience"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_the_answer_of_its_exit(kind: str, criterion: str, tmp_path: Path) -> None:
    case = Case(kind)
    engine = case.compiled(tmp_path, criterion=criterion)
    for _ in range(6):
        samples = case.samples(int(case.encoder.rng.integers(2, 12)))
        limits = case.encoder.rng.choice([0.0, 0.3, 0.6, 0.9, 1.0], len(samples))
        limits[:2] = 2.0, -1.0  # beyond the dial: one leaves at once, and one never
        told = [case.wanted(x, limit, criterion) for x, limit in zip(samples, limits, strict=True)]
        kept = [i for i, (_, _, near) in enumerate(told) if near > CLEAR or criterion == "patience"]
        given = [samples[i] for i in kept]
        logits, layers = engine.run(None, feeds(given, case.encoder.width, limits[kept]))
        wanted = np.array([told[i][0] for i in kept]).reshape(-1, case.encoder.classes)
        assert layers.tolist() == [told[i][1] for i in kept] and layers.dtype == np.int32
        np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_end_never_exits(kind: str, tmp_path: Path) -> None:
    case = Case(kind)
    engine = case.compiled(tmp_path)
    save_graph(case.encoder.graph(), tmp_path / "dense.onnx")
    dense = session(tmp_path / "dense.onnx")
    for count in (1, 2, 7):
        given = feeds(case.samples(count), case.encoder.width, 0.0)
        logits, layers = engine.run(None, given)
        (wanted,) = dense.run(None, {name: given[name] for name in ("lengths", "x")})
        np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)
        assert layers.tolist() == [case.encoder.layers] * count


@pytest.mark.parametrize("criterion", ["entropy", "probability", "patience"])
def test_a_batch_of_none_and_one_in_which_all_leave(criterion: str, tmp_path: Path) -> None:
    case = Case("light", classes=2)
    engine = case.compiled(tmp_path, criterion=criterion)
    logits, layers = engine.run(None, feeds([], case.encoder.width, 0.5))
    assert logits.shape == (0, 2) and layers.shape == (0,)
    samples = case.samples(5)
    logits, layers = engine.run(None, feeds(samples, case.encoder.width, 2.0))  # beyond the dial: everybody
    wanted = [exit_logits(case.exits, case.encoder.states(x)[0], 0, "light") for x in samples]
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)
    assert layers.tolist() == [0] * 5


def test_some_of_the_exits_without_a_report(tmp_path: Path) -> None:
    case = Case("first", after=(1,))
    engine = case.compiled(tmp_path, after=(1,), report=False)
    samples = case.samples(4)
    (logits,) = engine.run(None, feeds(samples, case.encoder.width, 2.0))
    wanted = [exit_logits(case.exits, case.encoder.states(x)[1], 1, "first") for x in samples]
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)


def refused(case: Case, graph: gs.Graph, **options: Any) -> str:
    with pytest.raises(PassError) as error:
        run_passes(graph, [EarlyExit(**options)], PassContext(case.profile))
    return f"{error.value.message}; {error.value.hint}"


def test_models_it_does_not_take() -> None:
    case = Case("light")
    graph = case.encoder.graph()
    graph.outputs[0].name = "scores"
    assert "one output is 'logits', and this model gives scores" in refused(case, graph)
    case = Case("light", after=(0, 1), classes=1)
    assert "two classes or more" in refused(case, case.encoder.graph())
    case = Case("light")
    case.profile.tensors = {n.replace("exit.3", "exit.4"): w for n, w in case.profile.tensors.items()}
    assert "behind 4 layers of a model in which 4 layers" in refused(case, case.encoder.graph())
    case = Case("light")
    del case.profile.tensors["learned.magic-pyramid.exit.1.out.bias"]
    assert "lacks 'out.bias'" in refused(case, case.encoder.graph())
    case, other = Case("light"), Encoder(3, width=30)
    assert "reads 48 numbers, the model has 30" in refused(case, other.graph())


def test_what_the_profile_lacks_is_told_first() -> None:
    case = Case("light", after=(0, 2))
    with pytest.raises(RecipeError, match="no exit behind 1 layers") as error:
        EarlyExit(after=(1,)).check_profile(case.profile, [])
    assert "0, 2" in str(error.value.hint)
    with pytest.raises(NotLearnedError, match="no weights learned by magic-pyramid"):
        EarlyExit().check_profile(None, [])
    case.profile.tensors = {"learned.magic-pyramid.thresholds": np.zeros(4, np.float32)}
    with pytest.raises(NotLearnedError, match="no exits"):
        EarlyExit().check_profile(case.profile, [])
