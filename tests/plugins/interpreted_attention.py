"""PackedAttention's GPU kernels on the CPU, by the Triton language's interpreter; a part of interpreted.py."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import torch
import triton.runtime.interpreter as interpreter

from trimtab.plugins.gpu import GpuKernel, Tile
from trimtab.plugins.gpu.launch import form_of, prepared
from trimtab.plugins.packed_attention.gpu import KERNELS

ROWS, RECEIVED = KERNELS
TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = ([], [0], [1], [0, 0, 1, 0], [17, 1, 0, 33], [5, 64, 3], [130], [16, 32, 48])

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of an attention."""

    heads: int
    kv_heads: int
    dim: int
    lengths: list[int]

    @property
    def attributes(self) -> dict[str, int | str]:
        return {"heads": self.heads, "kv_heads": 0 if self.heads == self.kv_heads else self.kv_heads}


def attention() -> None:
    """Every type and every batch of LENGTHS once, the rest at random."""
    _multiply_bfloat16()
    for number, lengths in enumerate(random.sample(LENGTHS, len(LENGTHS))):
        kv_heads = random.choice((1, 2))
        dim = random.choice((random.randint(1, 128), 16, 32, 64))
        _check(Sizes(kv_heads * random.choice((1, 3)), kv_heads, dim, lengths), TYPES[number % len(TYPES)])
    _check_hidden()
    _check_company()


def _check(sizes: Sizes, dtype: torch.dtype) -> None:
    inputs, scale = _inputs(sizes, dtype)
    context, received, sums, size = _expected(sizes, inputs, scale)
    for tile in _some(ROWS, sizes, inputs):
        wanted = random.random() < 0.5
        run, outputs = prepared(ROWS, inputs, sizes.attributes, tile, () if wanted else ("log_sum_exp",))
        _close(_filled(run, outputs)[0], context, size, dtype, (sizes, tile, sorted(inputs)))
        if wanted:
            _close(outputs[1], sums, sums.abs() + 1, torch.float32, (sizes, tile, sorted(inputs)))
    second = {name: tensor for name, tensor in inputs.items() if name != "v"} | {"log_sum_exp": sums.float()}
    for tile in _some(RECEIVED, sizes, second):
        run, outputs = prepared(RECEIVED, second, sizes.attributes, tile)
        _close(_filled(run, outputs)[0], received, received, torch.float32, (sizes, tile, sorted(inputs)))


def _check_hidden() -> None:
    """-inf in a bias hides keys, first ones of a tile too; a query without any is NaN, as in Softmax."""
    sizes = Sizes(2, 1, 24, [40, 3])
    inputs, scale = _inputs(sizes, torch.float32)
    bias = torch.randn(40, 40).masked_fill(torch.rand(40, 40) < 0.5, float("-inf"))
    bias[:, 39], bias[:3, 2] = 0.0, 0.0
    bias[7, :39], bias[4] = float("-inf"), float("-inf")
    inputs["bias"] = bias
    context, received, sums, size = _expected(sizes, inputs, scale)
    assert context[4].isnan().all() and not context[torch.arange(43) != 4].isnan().any()
    for tile in _some(ROWS, sizes, inputs):
        run, outputs = prepared(ROWS, inputs, sizes.attributes, tile)
        found, found_sums = _filled(run, outputs)
        assert torch.equal(found.isnan(), context.isnan()) and torch.equal(found_sums.isinf(), sums.isinf()), tile
        _close(found.nan_to_num(), context.nan_to_num(), size.nan_to_num(), torch.float32, (sizes, tile))
    second = {name: tensor for name, tensor in inputs.items() if name != "v"} | {"log_sum_exp": sums.float()}
    run, outputs = prepared(RECEIVED, second, sizes.attributes)
    (found,) = _filled(run, outputs)
    assert found[:40].isnan().all() and received[:40].isnan().all()
    _close(found[40:], received[40:], received[40:], torch.float32, sizes)


def _check_company() -> None:
    """A sample's results are the same bits alone and in a batch."""
    sizes = Sizes(2, 2, 20, [21, 50, 7])
    inputs, _ = _inputs(sizes, torch.float32)
    together = _both(sizes, inputs)
    for start, end in itertools.pairwise(inputs["offsets"].tolist()):
        own = {name: t[start:end] if name in ("q", "k", "v") else t for name, t in inputs.items()}
        alone = _both(sizes, own | {"offsets": torch.tensor([0, end - start], dtype=torch.int32)})
        assert all(torch.equal(a, whole[start:end]) for a, whole in zip(alone, together, strict=True))


def _both(sizes: Sizes, inputs: Tensors) -> list[torch.Tensor]:
    """Context and what is received, as the two launches give them."""
    run, outputs = prepared(ROWS, inputs, sizes.attributes)
    context, sums = _filled(run, outputs)
    second = {name: tensor for name, tensor in inputs.items() if name != "v"} | {"log_sum_exp": sums}
    run, outputs = prepared(RECEIVED, second, sizes.attributes)
    return [context, *_filled(run, outputs)]


def _inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensors, float]:
    """Random inputs, and the scale: q, k and v in one tensor or in three, a bias of any rank or none."""
    tokens, of_q, of_kv = sum(sizes.lengths), sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
    widths = random.choice(({"q": of_q, "k": of_kv, "v": of_kv}, {"q": of_q + 2 * of_kv}))
    inputs = {name: torch.randn(tokens, width).to(dtype) for name, width in widths.items()}
    inputs["offsets"] = torch.tensor([0, *itertools.accumulate(sizes.lengths)], dtype=torch.int32)
    if random.random() < 0.6:
        places = max(sizes.lengths, default=0) + random.choice((0, 3))
        lead = random.choice(([], [1], [sizes.heads], [1, 1], [1, sizes.heads]))
        inputs["bias"] = torch.randn(*lead, places, places).to(random.choice((dtype, torch.float32)))
    scale = sizes.dim**-0.5
    if random.random() < 0.5:
        scale *= random.uniform(-2, 2)
        inputs["scale"] = torch.tensor(scale)
    return inputs, scale


def _expected(sizes: Sizes, inputs: Tensors, scale: float) -> tuple[torch.Tensor, ...]:
    """Context, what is received, the log-sum-exp of each query, and the size of what the context sums, in float64."""
    h, c, d = sizes.heads, sizes.kv_heads, sizes.dim
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    q, k, v = wide["q"].split([h * d, c * d, c * d], 1) if "k" not in wide else (wide[name] for name in "qkv")
    shapes = (len(q), h, d), (len(q),), (len(q), h), (len(q), h, d)
    context, received, sums, size = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
    for start, end in itertools.pairwise(inputs["offsets"].tolist()):
        n = end - start
        if n == 0:
            continue
        keys, values = (x[start:end].reshape(n, c, d).repeat_interleave(h // c, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end].reshape(n, h, d), keys) * scale
        if "bias" in wide:
            bias = wide["bias"][..., :n, :n]
            scores = scores + bias.reshape(-1, n, n)
        weights = scores.softmax(-1)
        context[start:end] = torch.einsum("hqk,khd->qhd", weights, values)
        size[start:end] = torch.einsum("hqk,khd->qhd", weights, values.abs())
        received[start:end] = weights.mean((0, 1))
        sums[start:end] = scores.logsumexp(-1).T
    return context.reshape(len(q), h * d), received, sums, size


def _some(kernel: GpuKernel, sizes: Sizes, inputs: Tensors) -> list[Tile]:
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    tiles = list(kernel.tiles(form_of(kernel, inputs, sizes.attributes), shapes))
    return random.sample(tiles, min(2, len(tiles)))


def _filled(run: object, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a launch writes over NaN."""
    for output in outputs:
        output.fill_(float("nan"))
    run()  # type: ignore[operator]
    return outputs


def _close(found: torch.Tensor, expected: torch.Tensor, size: torch.Tensor, dtype: torch.dtype, where: object) -> None:
    """Equal up to rounding, measured against `size`: what is summed, whose signs may differ."""
    assert list(found.shape) == list(expected.shape), where
    error = float((found.double() - expected).norm() / size.norm().clamp(min=1e-9))
    assert error < LIMITS[dtype], (error, where)


def _multiply_bfloat16() -> None:
    """Let the interpreter multiply matrices of bfloat16, which it has as integers, by their values."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    plain, brain, single = builder.create_dot, triton_type("bfloat16"), triton_type("float32")

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != brain:
            return handle
        return interpreter.TensorHandle(convert(handle.data, brain, single, None).view(np.float32), single)

    def create_dot(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
        return plain(self, widened(a), widened(b), d, *rest)

    builder.create_dot = create_dot


def triton_type(name: str) -> object:
    return getattr(interpreter.tl, name)
