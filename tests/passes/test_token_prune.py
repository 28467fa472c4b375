"""token-prune: tokens leave as the definition says, sample by sample; alone and together with early exits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from packed_encoder import Encoder, exit_logits, stays
from positions import positional_graph
from rewrite import session
from scipy.special import softmax

from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.early_exit import EarlyExit
from trimtab.passes.errors import NotLearnedError, PassError, RecipeError
from trimtab.passes.graph import save_graph
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.token_prune import TokenPrune
from trimtab.passes.unpad import Unpad

CLEAR = 1e-4
"""How far importance is from a threshold, and from that of other tokens where they are ranked."""


class Case:
    """A random encoder with thresholds, or shares, of its layers, and exits."""

    def __init__(self, **sizes: int) -> None:
        self.seed = int(np.random.default_rng().integers(1 << 30))
        print(f"seed {self.seed}")
        self.encoder = Encoder(self.seed, **sizes)
        self.rng = self.encoder.rng
        self.thresholds = np.array([0, *self.rng.uniform(0.05, 0.3, self.encoder.layers - 1)], np.float32)
        self.exits = self.encoder.exit(2, "light")
        learned = {"thresholds": self.thresholds} | self.exits
        tensors = {f"learned.magic-pyramid.{name}": value for name, value in learned.items()}
        self.profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1), tensors)

    def compiled(self, folder: Path, *passes: Any) -> Any:
        graph = self.encoder.graph()
        results = run_passes(graph, passes, PassContext(self.profile))
        assert all(result.changed for result in results)
        blocks = find_anatomy(graph).blocks
        assert [block.attention is not None for block in blocks] == [True] * self.encoder.layers
        save_graph(graph, folder / "model.onnx")
        onnx.checker.check_model(folder / "model.onnx", full_check=True)
        return session(folder / "model.onnx")

    def samples(self, count: int) -> list[np.ndarray]:
        return [2 * self.rng.standard_normal((int(self.rng.integers(1, 20)), self.encoder.width)) for _ in range(count)]

    def prune(self, settings: np.ndarray, ratio: bool, near: list[float]) -> Any:
        """What stays behind the attention of a layer, from what each token receives."""

        def chosen(received: np.ndarray, layer: int) -> np.ndarray:
            keep, clear = stays(received, float(np.float32(settings[layer])), ratio)
            near.append(clear)
            return keep

        return chosen


def feeds(samples: list[np.ndarray], width: int, **dials: Any) -> dict[str, np.ndarray]:
    rows = np.concatenate([np.zeros((0, width)), *samples]).astype(np.float32)
    lengths = np.array([len(sample) for sample in samples], np.int32)
    return {"lengths": lengths, "x": rows} | {n: np.full(len(samples), v, np.float32) for n, v in dials.items()}


@pytest.mark.parametrize("ratio", [False, True])
def test_tokens_leave_sample_by_sample(ratio: bool, tmp_path: Path) -> None:
    case = Case()
    keep = tuple(case.rng.uniform(0.3, 0.9, case.encoder.layers))
    engine = case.compiled(tmp_path, TokenPrune(keep=keep) if ratio else TokenPrune())
    for _ in range(5):
        samples = case.samples(int(case.rng.integers(1, 9)))
        dials = case.rng.choice([0, 0.3, 1.0] if ratio else [0, 0.5, 1.0, 3.0], len(samples))
        wanted, kept = [], []
        for place, (x, dial) in enumerate(zip(samples, dials, strict=True)):
            near: list[float] = []
            settings = 1 - (1 - np.array(keep)) * dial if ratio else case.thresholds * dial
            states = case.encoder.states(x, case.prune(settings, ratio, near))
            if min(near, default=1) > CLEAR:
                wanted.append(case.encoder.logits(states[-1]))
                kept.append(place)
        (logits,) = engine.run(None, feeds([samples[i] for i in kept], case.encoder.width, prune=dials[kept]))
        np.testing.assert_allclose(logits, np.array(wanted).reshape(-1, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keep", [None, (0.5,)])
def test_the_exact_end_keeps_all(keep: Any, tmp_path: Path) -> None:
    case = Case()
    engine = case.compiled(tmp_path, TokenPrune(keep=keep))
    save_graph(case.encoder.graph(), tmp_path / "dense.onnx")
    for count in (0, 1, 5):
        given = feeds(case.samples(count), case.encoder.width)
        (wanted,) = session(tmp_path / "dense.onnx").run(None, given)
        (found,) = engine.run(None, given | {"prune": np.zeros(count, np.float32)})
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_both_together(tmp_path: Path) -> None:
    """Exits read the tokens that are left, and thresholds of later layers follow the samples that are left."""
    case = Case()
    engine = case.compiled(tmp_path, TokenPrune(), EarlyExit(criterion="probability"))
    for _ in range(4):
        samples = case.samples(7)
        prune, limits = case.rng.choice([0, 1.0, 2.0], 7), case.rng.choice([-1.0, 0.4, 2.0], 7)
        wanted, layers, kept = [], [], []
        for place, x in enumerate(samples):
            near: list[float] = []
            states = case.encoder.states(x, case.prune(case.thresholds * prune[place], False, near))
            answer = exit_logits(case.exits, states[2], 2, "light")
            doubt = 1 - float(softmax(answer).max())
            if min([*near, abs(doubt - limits[place])]) <= CLEAR:
                continue
            leaves = doubt < limits[place]
            wanted.append(answer if leaves else case.encoder.logits(states[-1]))
            layers.append(2 if leaves else case.encoder.layers)
            kept.append(place)
        given = feeds([samples[i] for i in kept], case.encoder.width, prune=prune[kept], exit_threshold=limits[kept])
        logits, ran = engine.run(None, given)
        assert ran.tolist() == layers
        np.testing.assert_allclose(logits, np.array(wanted).reshape(-1, 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("step", [TokenPrune(keep=(0.5,)), EarlyExit()])
def test_models_that_unpad_leaves(step: Any) -> None:
    """The reason is that of unpad, not that it is missing."""
    graph = positional_graph("deberta_v2")
    graph.outputs[0].name, graph.outputs[0].shape = "logits", ["batch", 3]  # as a classifier's
    with pytest.raises(PassError, match="needs packed tokens, and unpad leaves") as error:
        run_passes(graph, [Unpad(), step], PassContext(Case().profile))
    assert "attention 0: its scores depend on more than q and k" in error.value.message
    with pytest.raises(PassError, match="needs packed tokens") as error:
        run_passes(graph, [step], PassContext(Case().profile))
    assert "put the pass unpad in front" in str(error.value.hint)


def test_what_does_not_fit() -> None:
    case = Case()
    with pytest.raises(RecipeError, match=r"keep: 1.2 is no share"):
        TokenPrune(keep=(0.5, 1.2)).check_profile(None, [])
    with pytest.raises(NotLearnedError, match="no thresholds"):
        TokenPrune().check_profile(None, [])
    with pytest.raises(PassError, match="2 shares are given, and the model has 4 layers"):
        run_passes(case.encoder.graph(), [TokenPrune(keep=(0.5, 0.5))], PassContext(case.profile))
    assert EarlyExit().bars(TokenPrune()) is not None and TokenPrune().bars(EarlyExit()) is None
