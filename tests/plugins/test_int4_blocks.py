"""int4 of blocks that kernels pack with their scales: exact integers, scales of either size, blocks of every size."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import close, finish, graph_of, native, summed
from seeds import seeded

from trimtab.plugins import SPARSE_DOWN, SPARSE_UP, add_node
from trimtab.plugins.dialect import Op
from trimtab.plugins.library import instruction_set

WIDTHS = (32, 96, 544, 1120)
BLOCKS = (4, 8, 16, 24, 40, 64)
"""4: not packed; 8, 24 and 40: half a vector of 16; 40 and 64: more rows than are summed at a time."""


class Product:
    """SparseUp or SparseDown of one matrix, and the same in float64."""

    def __init__(self, op: Op, block: int, count: int, width: int, scale: np.ndarray, q: np.ndarray, threads: int = 2):
        self.op, self.block = op, block
        label, given = ("up", "x") if op is SPARSE_UP else ("down", "h")
        graph = graph_of(**{given: (np.float32, ["tokens", "in"]), "blocks": (np.int32, ["choices", "k"])})
        rows = {
            label: gs.Constant(label, q[:, 0::2] | (q[:, 1::2] << 4)),
            f"{label}_scale": gs.Constant(f"{label}_scale", scale),
        }
        graph.inputs[0].shape = ["tokens", width if op is SPARSE_UP else "chosen"]
        inputs = dict(zip((given, "blocks"), graph.inputs, strict=True)) | rows
        self.given = given
        model = finish(graph, add_node(graph, op, inputs, "y", block=block))
        self.session: ort.InferenceSession = native(model, threads)
        self.w = (q.astype(np.float64) - 8) * np.repeat(scale.astype(np.float64), 32, axis=1)

    def run(self, given: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        (y,) = self.session.run(None, {self.given: given, "blocks": blocks})
        return y

    def wanted(self, given: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        chosen = np.broadcast_to(blocks, (len(given), blocks.shape[1]))
        rows = (chosen[:, :, None] * self.block + np.arange(self.block)).reshape(len(given), -1)
        how = "tw,trw->tr" if self.op is SPARSE_UP else "tr,trw->tw"
        return np.einsum(how, given.astype(np.float64), self.w[rows])


def made(
    op: Op, block: int, count: int, width: int, short: bool, rng: np.random.Generator, threads: int = 2
) -> Product:
    scale = rng.random((block * count, width // 32), np.float32) / 10
    if short:
        scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    q = rng.integers(0, 16, (block * count, width)).astype(np.uint8)
    return Product(op, block, count, width, scale, q, threads)


def choices(tokens: int, count: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Of each token, in no order."""
    return np.stack([rng.permutation(count)[:k] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("op", [SPARSE_UP, SPARSE_DOWN], ids=lambda op: op.name)
def test_products(op: Op, block: int, short: bool) -> None:
    rng = seeded()
    width, count, threads = int(rng.choice(WIDTHS)), int(rng.integers(3, 20)), int(rng.integers(1, 4))
    product = made(op, block, count, width, short, rng, threads)
    for tokens in (1, 2, 5, int(rng.integers(6, 130))):
        k = int(rng.integers(1, count + 1))
        size = width if op is SPARSE_UP else k * block
        given = rng.standard_normal((tokens, size)).astype(np.float32)
        for blocks in (choices(tokens, count, k, rng), choices(1, count, k, rng)):
            spread = summed(given, np.abs(product.w).max() * np.ones((1, size)))
            close(product.run(given, blocks), product.wanted(given, blocks), "int4", spread)


@pytest.mark.parametrize("block", [8, 16, 40])
def test_a_token_alone_may_have_a_block_twice(block: int) -> None:
    rng = seeded()
    product = made(SPARSE_DOWN, block, 7, 96, True, rng)
    blocks = np.array([[5, 2, 2, 0, 5, 6, 1, 2]], np.int32)
    h = rng.standard_normal((1, 8 * block)).astype(np.float32)
    close(product.run(h, blocks), product.wanted(h, blocks), "int4", summed(h, np.full((1, 8 * block), 0.8)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("block", [8, 16, 40])
def test_what_two_bytes_hold_exactly_is_multiplied_exactly(block: int, width: int) -> None:
    """Integers, of each 32 the first as large as two bytes hold: nothing is rounded but the last sums, in float32."""
    if instruction_set() == "portable":
        pytest.skip("portable kernels pack nothing: activations have 32767 levels")
    rng = seeded()
    most, count, tokens = 127 * 257, 5, int(rng.integers(1, 40))

    def exact(rows: int, size: int, group: int) -> np.ndarray:
        values = rng.integers(-most, most + 1, (rows, size)).astype(np.float32)
        values[:, ::group] = most
        return values

    blocks = np.tile(np.arange(count, dtype=np.int32), (tokens, 1))
    for op, size in ((SPARSE_UP, width), (SPARSE_DOWN, block * count)):
        q = rng.integers(0, 16, (block * count, width)).astype(np.uint8)
        q[::2] = 15 * (q[::2] > 7)  # the largest sums, too
        product = Product(op, block, count, width, np.ones((block * count, width // 32), np.float32), q)
        given = exact(tokens, size, 8)
        wanted = product.wanted(given, blocks)
        # What float32 holds of the numbers that are added.
        error = 2e-7 * np.abs(given).sum(1, keepdims=True) * 8
        assert (np.abs(product.run(given, blocks) - wanted) <= error).all()


def test_scales_that_bfloat16_does_not_hold_are_not_rounded() -> None:
    if instruction_set() == "portable":
        pytest.skip("portable kernels round to 16 bits: a scale's last bits do not show")
    rng = seeded()
    scale = np.full((8, 2), 1 + 2**-20, np.float32)
    q = np.full((8, 64), 9, np.uint8)
    for op, size in ((SPARSE_UP, 64), (SPARSE_DOWN, 8)):
        product = Product(op, 8, 1, 64, scale, q)
        given = np.ones((1, size), np.float32) * np.float32(rng.choice([1, 2, 4]))
        found = product.run(given, np.zeros((1, 1), np.int32))
        np.testing.assert_allclose(found, product.wanted(given, np.zeros((1, 1), np.int32)), rtol=2e-7)
