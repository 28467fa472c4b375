"""Calibration measures what float64 arithmetic on the unpadded tokens gives, in constant memory."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from seeds import seeded

from tests import tiny, zoo
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.meters import Reservoir
from trimtab.compiler.sources import Source
from trimtab.passes.errors import DataError, InputError, ModelError
from trimtab.passes.graph import constant, save_graph
from trimtab.passes.profile import Profile

WORDS, WIDTH, NEURONS = 102, 12, (20, 28)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"table": (WORDS, WIDTH)}
    for i, neurons in enumerate(NEURONS):
        shapes |= {f"{i}/up": (WIDTH, neurons), f"{i}/bias": (neurons,), f"{i}/down": (neurons, WIDTH)}
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def model(path: Path, arrays: dict[str, np.ndarray], *, flat: bool = False, external: bool = True) -> Source:
    """ids → table → two ReLU FFNs with residuals; with `flat`, the FFNs see [batch·tokens, width]."""
    nodes: list[gs.Node] = []

    def add(op: str, *inputs: gs.Tensor | np.ndarray | str, dtype: type | None = None) -> gs.Variable:
        out = gs.Variable(f"{op}/{len(nodes)}", dtype)
        made = [constant(t, arrays[t]) if isinstance(t, str) else t for t in inputs]
        made = [constant(f"c{len(nodes)}", t) if isinstance(t, np.ndarray) else t for t in made]
        nodes.append(gs.Node(op, name=out.name, inputs=made, outputs=[out]))
        return out

    ids = gs.Variable("input_ids", np.int64, ["batch", "tokens"])
    x: gs.Tensor = add("Gather", "table", ids)
    if flat:
        x = add("Reshape", x, np.array([-1, WIDTH]))
    for i in range(len(NEURONS)):
        hidden = add("Relu", add("Add", add("MatMul", x, f"{i}/up"), f"{i}/bias"))
        x = add("Add", x, add("MatMul", hidden, f"{i}/down"))
    x.dtype, x.shape = np.float32, ["n", WIDTH] if flat else ["batch", "tokens", WIDTH]
    save_graph(gs.Graph(nodes, [ids], [x], opset=20), path, external=external)
    return Source(str(path), path, None, None, None, "onnx")


def reference(arrays: dict[str, np.ndarray], ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(x, hidden) of each FFN for tokens [n], in float64."""
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    x, found = wide["table"][ids], []
    for i in range(len(NEURONS)):
        hidden = np.maximum(x @ wide[f"{i}/up"] + wide[f"{i}/bias"], 0)
        found.append((x, hidden))
        x = x + hidden @ wide[f"{i}/down"]
    return found


@pytest.fixture
def texts(tmp_path: Path) -> Dataset:
    rng = np.random.default_rng(7)
    lines = [" ".join(f"w{j}" for j in rng.integers(0, 90, n)) for n in rng.integers(1, 12, 61)]
    (tmp_path / "d.txt").write_text("\n".join(lines))
    return read_data(tmp_path / "d.txt")


def tokens_of(data: Dataset) -> np.ndarray:
    return np.array([int(word[1:]) + 2 for text, _ in data.texts for word in text.split()])


def with_tokenizer(source: Source, folder: Path) -> Source:
    return Source(source.origin, source.onnx, folder, None, None, "onnx")


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("flat", [False, True])
def test_statistics_are_those_of_float64(
    tmp_path: Path, texts: Dataset, word_tokenizer: Path, batch_size: int, flat: bool
) -> None:
    arrays = weights()
    source = with_tokenizer(model(tmp_path / "m.onnx", arrays, flat=flat), word_tokenizer)
    profile = calibrate(source, texts, batch_size=batch_size, states=50)
    ids = tokens_of(texts)
    assert profile.info.samples == 61
    assert profile.info.tokens == len(ids)
    assert profile.info.model == source.fingerprint
    assert profile.info.data == texts.sha256
    for layer, (x, hidden) in enumerate(reference(arrays, ids)):
        stats = profile.ffn(layer, NEURONS[layer], WIDTH)
        assert stats.tokens == len(ids)
        for found, expected in (
            (stats.sum, hidden.sum(0)), (stats.abs_sum, np.abs(hidden).sum(0)), (stats.square_sum, (hidden**2).sum(0)),
        ):  # fmt: skip
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert stats.states.shape == (50, WIDTH) and stats.states.dtype == np.float32
        distance = np.abs(stats.states[:, None] - x[None]).max(-1).min(1)
        assert distance.max() < 1e-4  # every state is the input of a real token


def test_states_are_of_the_same_tokens_in_every_layer_and_batch_size(
    tmp_path: Path, texts: Dataset, word_tokenizer: Path
) -> None:
    arrays = weights()
    source = with_tokenizer(model(tmp_path / "m.onnx", arrays), word_tokenizer)
    profiles = [calibrate(source, texts, batch_size=size, states=64, seed=5) for size in (1, 16)]
    first, second = (profiles[0].ffn(i, NEURONS[i], WIDTH).states for i in (0, 1))
    ids = np.abs(first[:, None] - arrays["table"][None]).max(-1).argmin(1)
    np.testing.assert_allclose(second, reference(arrays, ids)[1][0], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        a, b = (p.ffn(layer, NEURONS[layer], WIDTH).states for p in profiles)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    other = calibrate(source, texts, states=64, seed=6).ffn(0, NEURONS[0], WIDTH).states
    assert np.abs(other - first).max() > 0.1


@pytest.mark.parametrize("external", [True, False])
def test_weights_inside_and_outside_the_file(
    tmp_path: Path, texts: Dataset, word_tokenizer: Path, external: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.compiler.calibrate._INLINE_LIMIT", 1000)
    arrays = weights()
    source = with_tokenizer(model(tmp_path / "m.onnx", arrays, external=external), word_tokenizer)
    stats = calibrate(source, texts).ffn(1, NEURONS[1], WIDTH)
    np.testing.assert_allclose(stats.sum, reference(arrays, tokens_of(texts))[1][1].sum(0), rtol=1e-5, atol=1e-5)


def test_long_batches_are_run_in_parts(
    tmp_path: Path, texts: Dataset, word_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_tokenizer(model(tmp_path / "m.onnx", weights()), word_tokenizer)
    whole = calibrate(source, texts, batch_size=61)
    monkeypatch.setattr("trimtab.compiler.calibrate._ROOM", 5000)  # fourteen tokens
    parts = calibrate(source, texts, batch_size=61)
    for name, array in whole.tensors.items():
        np.testing.assert_allclose(parts.tensors[name], array, rtol=1e-5, atol=1e-5)


def test_raw_tensors(tmp_path: Path) -> None:
    source = Source("m", tiny.model(tmp_path / "m.onnx"), None, None, None, "onnx")
    seen: list[tuple[str, int, int]] = []
    profile = calibrate(
        source,
        read_data(tiny.data(tmp_path / "d.npz", 20)),
        samples=10,
        batch_size=4,
        progress=lambda *a: seen.append(a),
    )
    assert seen == [("calibrate", 4, 10), ("calibrate", 8, 10), ("calibrate", 10, 10)]
    stats = profile.ffn(0, tiny.NEURONS, tiny.WIDTH)
    assert stats.tokens == 120 == len(stats.states)
    profile.save(tmp_path / "p")
    Profile.load(tmp_path / "p").check(source.fingerprint)


def test_memory_is_constant_in_the_number_of_samples(tmp_path: Path, word_tokenizer: Path) -> None:
    source = with_tokenizer(model(tmp_path / "m.onnx", weights()), word_tokenizer)
    few, many = 600, 20_000
    peaks = []
    for count in (few, few, many, many):  # the first one warms up
        (tmp_path / "d.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * count)
        data = read_data(tmp_path / "d.txt")
        gc.collect()
        tracemalloc.start()
        profile = calibrate(source, data, samples=count, batch_size=32, states=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert profile.info.tokens == 8 * count
    # A peak holds some 50 kB of cycles that nobody has collected yet, so what counts is growth: under a byte a token.
    assert min(peaks[2:]) - peaks[1] < 8 * (many - few)


@pytest.mark.parametrize(("family", "exporter"), [("bert", "dynamo"), ("llama", "genai")])
def test_padding_of_real_models_counts_for_nothing(
    texts: Dataset, word_tokenizer: Path, family: str, exporter: str
) -> None:
    """With attention, and for the decoder with an empty cache, whose head size this exporter does not tell."""
    path = zoo.exported(family, exporter)
    source = Source(family, path, word_tokenizer, None, zoo.TEXT, "onnx")
    alone, together = (calibrate(source, texts, batch_size=size, states=30) for size in (1, 20))
    assert alone.info.tokens == len(tokens_of(texts))
    assert alone.tensors.keys() == together.tensors.keys()
    for name, array in alone.tensors.items():
        np.testing.assert_allclose(together.tensors[name], array, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_name_the_layer(
    tmp_path: Path, texts: Dataset, word_tokenizer: Path, bad: float
) -> None:
    arrays = weights()
    arrays["1/bias"][4] = bad
    source = with_tokenizer(model(tmp_path / "m.onnx", arrays), word_tokenizer)
    with pytest.raises(ModelError, match=r"layer 1 FFN: .*NaN or Inf"):
        calibrate(source, texts)


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "8", True])
@pytest.mark.parametrize("name", ["samples", "batch_size", "max_tokens", "states"])
def test_counts_of_nothing(tmp_path: Path, word_tokenizer: Path, texts: Dataset, name: str, wrong: Any) -> None:
    source = with_tokenizer(model(tmp_path / "m.onnx", weights()), word_tokenizer)
    with pytest.raises(InputError, match=f"{name} is {wrong!r}, not an integer of at least 1"):
        calibrate(source, texts, **{name: wrong})


def test_a_model_without_ffn(tmp_path: Path) -> None:
    source = Source("m", tiny.model(tmp_path / "m.onnx", ffn=False), None, None, None, "onnx")
    with pytest.raises(ModelError, match="no FFN"):
        calibrate(source, read_data(tiny.data(tmp_path / "d.npz")))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    source = Source("m", tiny.model(tmp_path / "m.onnx"), None, None, None, "onnx")
    np.savez(tmp_path / "d.npz", other=np.zeros((3, 4), np.int64))
    with pytest.raises(DataError, match="other"):
        calibrate(source, read_data(tmp_path / "d.npz"))


def sampled(size: int, count: int, seed: int, batch: int) -> np.ndarray:
    reservoir = Reservoir(size, 1, seed)
    for start in range(0, count, batch):
        reservoir.add(np.arange(start, min(start + batch, count), dtype=np.float32)[:, None])
    return reservoir.rows[:, 0].astype(int)


def test_reservoir_is_uniform_and_knows_no_batches() -> None:
    size, count, rounds = 20, 200, 400
    counts = np.zeros(count)
    for seed in range(rounds):
        rows = sampled(size, count, seed, batch=33)
        assert len(set(rows)) == size
        np.testing.assert_array_equal(rows, sampled(size, count, seed, batch=count))
        np.testing.assert_array_equal(rows, sampled(size, count, seed, batch=1))
        counts[rows] += 1
    expected = rounds * size / count
    assert 130 < ((counts - expected) ** 2 / expected).sum() < 260  # chi-square, 199 degrees
    halves: Any = counts.reshape(4, -1).sum(1) / counts.sum()
    assert np.abs(halves - 0.25).max() < 0.02


def test_a_reservoir_that_is_not_full_keeps_all() -> None:
    np.testing.assert_array_equal(sampled(20, 7, 0, 3), np.arange(7))


def test_a_vocabulary_head_is_sampled_and_a_classifier_is_not(tmp_path: Path) -> None:
    rng = seeded()
    for family, sampled in (("llama", True), ("bert", False)):
        path = zoo.exported(family)
        feeds = zoo.feeds(family, 40, 9, rng)
        np.savez(tmp_path / f"{family}.npz", **feeds)
        source = Source(family, path, None, None, None, "onnx")
        profile = calibrate(source, read_data(tmp_path / f"{family}.npz"), states=50)
        assert ("head.states" in profile.tensors) == sampled
        if sampled:
            assert profile.head(64).shape == (50, 64)
            # Behind the last norm every state has about one mean square.
            assert np.all(np.isfinite(profile.head(64))) and profile.head(64).std() > 0.1
