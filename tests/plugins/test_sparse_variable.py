"""Choices of a number of blocks that differs from token to token; blocks are read once for all who take them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import ACTIVATIONS, FORMATS, close, everywhere, finish, graph_of, native, summed, weights
from seeds import seeded

from trimtab.plugins import SPARSE_DOWN, SPARSE_UP, add_node
from trimtab.plugins.dialect import Op
from trimtab.plugins.library import instruction_set

LEVELS, LARGEST = (127, 127 * 257) if instruction_set().endswith("vnni") else (64, 63 * 129)
"""What the kernels round activations to, to either side of 0: one byte, and two."""


def some_choices(tokens: int, blocks: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """From none to k blocks of each token, ascending, and -1 behind them, [tokens, k]."""
    made = np.full((tokens, k), -1, np.int32)
    for row, count in zip(made, rng.integers(0, k + 1, tokens), strict=True):
        row[:count] = np.sort(rng.choice(blocks, count, replace=False))
    return made


class Case:
    """A random FFN as the two ops, and what it computes in float64."""

    def __init__(self, form: str, width: int, block: int, count: int, gated: bool, rng: np.random.Generator) -> None:
        self.form, self.block, self.gated, neurons = form, block, gated, block * count
        graph = graph_of(x=(np.float32, ["batch", "tokens", width]), blocks=(np.int32, ["selections", "k"]))
        x, blocks = graph.inputs
        ups, self.up = weights("up", neurons, width, form, rng)
        downs, self.down = weights("down", neurons, width, form, rng)
        self.bias = rng.standard_normal(neurons).astype(np.float32)
        inputs: dict[str, gs.Tensor] = {"x": x, "blocks": blocks} | ups
        inputs["gate_bias" if gated else "up_bias"] = gs.Constant("bias", self.bias)
        if gated:
            gates, self.gate = weights("gate", neurons, width, form, rng)
            inputs |= gates
        self.activation = str(rng.choice(["gelu", "silu", "relu"]))
        shared = {"block": block, "at_most": 1}
        h = add_node(graph, SPARSE_UP, inputs, "h", activation=self.activation, **shared)
        y = add_node(graph, SPARSE_DOWN, {"h": h, "blocks": blocks} | downs, "y", **shared)
        self.model = finish(graph, h, y)

    def expected(self, x: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """h, y, and the size of the numbers that h sums."""
        x, act = x.reshape(-1, x.shape[-1]).astype(np.float64), ACTIVATIONS[self.activation]
        up, spread = x @ self.up.T, summed(x, self.up) if len(x) else 1.0
        if self.gated:
            pre = x @ self.gate.T + self.bias
            spread = spread * float(np.abs(act(pre)).max(initial=1)) + float(np.abs(up).max(initial=1)) * spread
            dense = act(pre) * up
        else:
            dense = act(up + self.bias)
        chosen = np.broadcast_to(blocks, (len(x), blocks.shape[1]))
        rows = (chosen[:, :, None] * self.block + np.arange(self.block)).reshape(len(x), chosen.shape[1] * self.block)
        there = np.repeat(chosen >= 0, self.block, 1)
        h = np.where(there, np.take_along_axis(dense, np.maximum(rows, 0), 1), 0)
        mask = np.zeros((len(x), len(self.down) + 1))
        np.put_along_axis(mask, np.where(there, rows, len(self.down)), 1, 1)
        y = (dense * mask[:, :-1]) @ self.down
        return h, y, float(spread)

    def check(self, found: list[np.ndarray], x: np.ndarray, blocks: np.ndarray) -> None:
        h, y, spread = self.expected(x, blocks)
        lead = x.shape[:-1]
        together = self.block >= 8 and len(h) >= 3
        close(found[0].reshape(h.shape), h, self.form, spread, together=together)
        scale = spread * np.sqrt(max(h.shape[1], 1)) * float(np.abs(self.down).max())
        close(found[1], y.reshape(*lead, self.down.shape[1]), self.form, scale, together=together)
        absent = np.broadcast_to(np.repeat(blocks < 0, self.block, 1), h.shape)
        assert not found[0].reshape(h.shape)[absent].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_each_token_takes_as_many_as_it_wants(form: str, gated: bool) -> None:
    """Single tokens, few, and more than a tile of the kernels; none; one choice for all of them."""
    rng = seeded()
    block, count = int(rng.choice([1, 4, 8, 32])), int(rng.integers(3, 12))
    case = Case(form, 32 * int(rng.integers(1, 6)), block, count, gated, rng)
    for batch, tokens, shared in (
        (1, 1, False),
        (2, 2, False),
        (0, 5, False),
        (2, 3, True),
        (0, 3, True),
        (3, 11, False),
    ):
        x = rng.standard_normal((batch, tokens, case.up.shape[1])).astype(np.float32)
        k = int(rng.integers(1, count + 1))
        blocks = some_choices(1 if shared else batch * tokens, count, k, rng)
        for found in everywhere(case.model, {"x": x, "blocks": blocks}).values():
            case.check(found, x, blocks)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", FORMATS)
def test_blocks_are_read_once_for_many_tokens(form: str, threads: int) -> None:
    """Sizes beyond what the kernels take at a time, and none that divides: blocks for few of the tokens and for all."""
    rng = seeded()
    width = 32 * int(rng.integers(17, 80)) if form == "int4" else int(rng.integers(500, 2400))
    case = Case(form, width, int(rng.choice([8, 12, 32, 33])), 13, bool(rng.integers(2)), rng)
    engine = native(case.model, threads)
    every = np.arange(13, dtype=np.int32)
    for tokens in (2, 3, int(rng.integers(4, 71)), 48, 97, 200):
        x = rng.standard_normal((1, tokens, width)).astype(np.float32)
        some = some_choices(tokens, 13, int(rng.integers(1, 14)), rng)
        for blocks in (some, every[None], np.tile(every, (tokens, 1)), np.full((tokens, 2), -1, np.int32)):
            case.check(engine.run(None, {"x": x, "blocks": blocks}), x, blocks)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("width", [5, 64, 100, 1504])
@pytest.mark.parametrize("block", [8, 16, 33, 40, 64])
def test_what_bytes_hold_exactly_is_multiplied_exactly(block: int, width: int, few: bool) -> None:
    """Integers, of each group with one scale the largest as large as one or two bytes': rounding changes nothing."""
    rng = seeded()
    tokens, count = int(rng.integers(1, 3) if few else rng.integers(3, 71)), 5
    most = LARGEST if few else LEVELS

    def exact(rows: int, size: int, group: int) -> np.ndarray:
        values = rng.integers(-most, most + 1, (rows, size)).astype(np.float32)
        values[:, ::group] = most
        return values

    def product(op: Op, given: str, label: str, size: int) -> tuple[ort.InferenceSession, np.ndarray]:
        graph = graph_of(**{given: (np.float32, ["tokens", size]), "blocks": (np.int32, ["choices", "k"])})
        q = rng.integers(-128, 128, (block * count, width)).astype(np.int8)
        rows = {label: gs.Constant(label, q), f"{label}_scale": gs.Constant("scale", np.ones(len(q), np.float32))}
        inputs = dict(zip((given, "blocks"), graph.inputs, strict=True)) | rows
        return native(finish(graph, add_node(graph, op, inputs, "y", block=block))), q.astype(np.float64)

    def equal(found: np.ndarray, given: np.ndarray, q: np.ndarray) -> None:
        wanted = given @ q
        error = 1e-6 * np.abs(wanted).max() if few else 2  # float32 holds no more
        if instruction_set() == "portable" or block % 8 or width % 16:  # of 16 bits, and no bytes
            error = error + 7 * most / 32767 / np.sqrt(12) * np.linalg.norm(q, axis=0)
        assert (np.abs(found - wanted) <= error + 1e-5 * np.abs(wanted)).all()

    blocks = np.tile(np.arange(count, dtype=np.int32), (tokens, 1))
    up, q = product(SPARSE_UP, "x", "up", width)
    x = exact(tokens, width, 1024)
    (h,) = up.run(None, {"x": x, "blocks": blocks})
    equal(h, x, q.T)
    down, q = product(SPARSE_DOWN, "h", "down", block * count)
    h = exact(tokens * count, block, 32).reshape(tokens, -1)
    (y,) = down.run(None, {"h": h, "blocks": blocks})
    equal(y, h, q)


@pytest.mark.parametrize("what", [np.nan, np.inf])
@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_what_is_no_number_stays_with_its_token(form: str, block: int, tokens: int, what: float) -> None:
    """All of its token is not finite, and nothing of the others, however many tokens are multiplied together."""
    rng = seeded()
    case = Case(form, 160, block, 6, True, rng)
    x, spoilt = rng.standard_normal((1, tokens, 160)).astype(np.float32), rng.integers(tokens)
    x[0, spoilt, rng.integers(160)] = what
    blocks = np.tile(np.arange(6, dtype=np.int32), (tokens, 1))
    for name, (_, y) in everywhere(case.model, {"x": x, "blocks": blocks}).items():
        finite = np.isfinite(y[0]).all(1)
        assert np.flatnonzero(~finite).tolist() == [spoilt], name
        assert what == np.inf or not np.isfinite(y[0, spoilt]).any(), name


@pytest.mark.parametrize("tokens", [1, 2, 100])
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_to_sum(form: str, tokens: int) -> None:
    """Blocks that nobody takes, and activations that are all 0."""
    case = Case(form, 64, 8, 6, True, seeded())  # up is 0 without a bias
    x = np.zeros((1, tokens, 64), np.float32)
    for blocks in (np.full((tokens, 2), -1, np.int32), np.zeros((1, 1), np.int32)):
        for name, (_, y) in everywhere(case.model, {"x": x, "blocks": blocks}).items():
            assert not y.any(), name


@pytest.mark.parametrize("blocks", [[[0, 6]], [[-1, 0]], [[0, -2]]])
def test_kernels_refuse_other_numbers(blocks: list[list[int]]) -> None:
    case = Case("float32", 32, 8, 6, False, seeded())
    with pytest.raises(Exception, match="lies outside"):
        native(case.model).run(None, {"x": np.ones((1, 1, 32), np.float32), "blocks": np.array(blocks, np.int32)})


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("form", FORMATS)
def test_a_block_that_is_chosen_twice_adds_twice(form: str, tokens: int) -> None:
    """No op makes such choices, but callers may: also where tokens are summed together."""
    rng = seeded()
    block, width = int(rng.choice([4, 8, 32])), 32 * int(rng.integers(1, 4))
    graph = graph_of(h=(np.float32, ["tokens", 3 * block]), blocks=(np.int32, ["choices", 3]))
    rows, down = weights("down", 5 * block, width, form, rng)
    inputs = dict(zip(("h", "blocks"), graph.inputs, strict=True)) | rows
    model = finish(graph, add_node(graph, SPARSE_DOWN, inputs, "y", block=block))
    h = rng.standard_normal((tokens, 3 * block)).astype(np.float32)
    chosen = rng.integers(0, 5, (tokens, 3)).astype(np.int32)
    chosen[:, 2] = chosen[:, 0]
    parts, each = h.reshape(tokens, 3, block).astype(np.float64), down.reshape(5, block, width)[chosen]
    for (y,) in everywhere(model, {"h": h, "blocks": chosen}).values():
        close(y, np.einsum("tkb,tkbw->tw", parts, each), form, summed(h, down[: 3 * block].T), together=True)


@pytest.mark.parametrize("name", ["up_bias", "gate_bias"])
@pytest.mark.parametrize(
    "bias", [np.ones(48, np.float16), np.ones(8, np.float32), np.float32(1)], ids=["half", "few", "one"]
)
def test_kernels_refuse_other_biases(bias: np.ndarray, name: str) -> None:
    graph = graph_of(x=(np.float32, ["tokens", 32]), blocks=(np.int32, ["choices", "k"]))
    rows = [weights(label, 48, 32, "int8", seeded())[0] for label in ("up", "gate")]
    inputs = dict(zip(("x", "blocks"), graph.inputs, strict=True)) | rows[0] | rows[1]
    inputs[name] = gs.Constant("bias", np.asarray(bias))
    session = native(finish(graph, add_node(graph, SPARSE_UP, inputs, "h", block=8, activation="relu")))
    with pytest.raises(Exception, match="biases are not float32"):
        session.run(None, {"x": np.ones((2, 32), np.float32), "blocks": np.zeros((1, 2), np.int32)})
