"""PackedAttention: kernel, reference body, ONNX's evaluator and attention in float64 agree, sample by sample."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.plugins import PACKED_ATTENTION, add_multi_output_node, add_node

BIAS_SHAPES = ("[s, s]", "[1, s, s]", "[heads, s, s]", "[1, heads, s, s]")


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention."""

    heads: int
    kv_heads: int
    dim: int


def some_heads(rng: np.random.Generator) -> Heads:
    kv_heads = int(rng.integers(1, 5))
    return Heads(kv_heads * int(rng.integers(1, 4)), kv_heads, int(rng.integers(8, 129)))


def model_of(
    size: Heads, packed: bool = False, bias: str | None = None, scale: float | None = None, received: bool = False
) -> onnx.ModelProto:
    """Inputs q, k, v or qkv, offsets and, if given, a bias of `bias`'s rank."""
    of_q, of_kv = size.heads * size.dim, size.kv_heads * size.dim
    widths = {"q": of_q + 2 * of_kv} if packed else {"q": of_q, "k": of_kv, "v": of_kv}
    shapes = {name: (np.float32, ["tokens", width]) for name, width in widths.items()}
    shapes["offsets"] = (np.int32, ["ends"])
    if bias is not None:
        lead = {"[s, s]": [], "[1, s, s]": [1], "[heads, s, s]": [size.heads], "[1, heads, s, s]": [1, size.heads]}
        shapes["bias"] = (np.float32, [*lead[bias], "size", "size"])
    graph = graph_of(**shapes)
    inputs: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in graph.inputs}
    if scale is not None:
        inputs["scale"] = gs.Constant("scale", np.array(scale, np.float32))
    kv_heads = 0 if size.kv_heads == size.heads else size.kv_heads
    names = ["context", "received"] if received else ["context"]
    outputs = add_multi_output_node(
        graph, PACKED_ATTENTION, inputs, "attention", names, heads=size.heads, kv_heads=kv_heads
    )
    return finish(graph, *outputs)


def feeds_of(
    model: onnx.ModelProto, lengths: list[int], rng: np.random.Generator, size: int | None = None
) -> dict[str, np.ndarray]:
    """Random inputs of a batch of samples of these lengths; a bias of `size` positions."""
    sizes = {"tokens": sum(lengths), "size": size if size is not None else max(lengths, default=0)}
    feeds = {}
    for each in model.graph.input:
        shape = [d.dim_value or sizes.get(d.dim_param, 0) for d in each.type.tensor_type.shape.dim]
        feeds[each.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds | {"offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)}


def attention(size: Heads, feeds: dict[str, np.ndarray], scale: float | None = None) -> np.ndarray:
    """The context, in float64."""
    return attention_and_received(size, feeds, scale)[0]


def attention_and_received(
    size: Heads, feeds: dict[str, np.ndarray], scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both outputs, in float64."""
    wide = {name: value.astype(np.float64) for name, value in feeds.items() if name != "offsets"}
    q, offsets, (h, c, d) = wide["q"], feeds["offsets"], (size.heads, size.kv_heads, size.dim)
    k, v = (wide["k"], wide["v"]) if "k" in wide else (q[:, h * d : (h + c) * d], q[:, (h + c) * d :])
    context, received = np.zeros((len(q), h, d)), np.zeros(len(q))
    for start, end in itertools.pairwise(offsets):
        n = end - start
        queries = q[start:end, : h * d].reshape(n, h, d)
        keys, values = (np.repeat(x[start:end].reshape(n, c, d), h // c, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", queries, keys) * (d**-0.5 if scale is None else scale)
        if "bias" in wide:
            of = wide["bias"].shape[-3] if wide["bias"].ndim > 2 else 1
            scores = scores + wide["bias"][..., :n, :n].reshape(of, n, n)
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(axis=-1, initial=-np.inf, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
        context[start:end] = np.einsum("hqk,khd->qhd", weights, values)
        received[start:end] = weights.sum(axis=(0, 1)) / (h * max(n, 1))
    return context.reshape(len(q), h * d), received


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal up to the rounding of float32: values are about 1, and so is what weights sum up to."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "lengths", [[], [0], [1], [0, 0], [3, 0, 17], [1, 1, 1], [48], [5, 64, 33, 0], [130, 2]], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_lengths(lengths: list[int], packed: bool) -> None:
    rng = seeded()
    size = some_heads(rng)
    model = model_of(size, packed)
    feeds = feeds_of(model, lengths, rng)
    for (found,) in everywhere(model, feeds).values():
        close(found, attention(size, feeds))


@pytest.mark.parametrize("dim", [8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128])
def test_head_sizes(dim: int) -> None:
    rng = seeded()
    size = Heads(4, int(rng.choice([1, 2, 4])), dim)
    model = model_of(size)
    feeds = feeds_of(model, [int(n) for n in rng.integers(1, 70, 3)], rng)
    close(native(model).run(None, feeds)[0], attention(size, feeds))


@pytest.mark.parametrize("tokens", [191, 192, 193, 255, 256, 257, 511, 512, 513, 1000])
def test_long_samples(tokens: int) -> None:
    """Several blocks of keys, several parts of queries."""
    rng = seeded()
    size = Heads(2, int(rng.choice([1, 2])), int(rng.integers(8, 65)))
    model = model_of(size, bias=str(rng.choice(BIAS_SHAPES)))
    feeds = feeds_of(model, [tokens, int(rng.integers(1, 300))], rng)
    feeds["q"] *= 4  # so that largest scores differ from block to block
    close(native(model).run(None, feeds)[0], attention(size, feeds))


@pytest.mark.parametrize("bias", BIAS_SHAPES)
def test_bias_and_scale(bias: str) -> None:
    rng = seeded()
    size = some_heads(rng)
    scale = float(rng.uniform(-2, 2)) / size.dim**0.5
    model = model_of(size, bool(rng.integers(2)), bias, scale)
    lengths = [int(n) for n in rng.integers(0, 40, 4)]
    feeds = feeds_of(model, lengths, rng, max(lengths) + int(rng.integers(3)))
    for (found,) in everywhere(model, feeds).values():
        close(found, attention(size, feeds, scale))


def test_a_bias_of_no_positions() -> None:
    rng = seeded()
    model = model_of(Heads(2, 1, 8), bias="[heads, s, s]")
    for (found,) in everywhere(model, feeds_of(model, [0, 0], rng)).values():
        assert found.shape == (0, 16)


@pytest.mark.parametrize("tokens", [20, 300])
def test_keys_that_a_bias_hides(tokens: int) -> None:
    """-inf hides keys, whole blocks of them too; a query without any key is NaN, as Softmax has it."""
    rng = seeded()
    size = Heads(2, 2, 24)
    model = model_of(size, bias="[s, s]")
    feeds = feeds_of(model, [tokens], rng)
    hidden = rng.random((tokens, tokens)) < 0.5
    hidden[:, 3] = False
    hidden[1, :-1], hidden[2, 1:], hidden[4] = True, True, True
    hidden[1, -1] = hidden[2, 0] = False
    feeds["bias"][hidden] = -np.inf
    wanted = attention(size, feeds)
    assert np.isnan(wanted[4]).all() and np.isfinite(np.delete(wanted, 4, axis=0)).all()
    for (found,) in everywhere(model, feeds).values():
        close(found, wanted)


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_sample(where: str, what: float) -> None:
    rng = seeded()
    size = Heads(2, 2, 16)
    model = model_of(size)
    feeds = feeds_of(model, [20, 30, 10], rng)
    feeds[where][25, 5] = what
    with np.errstate(invalid="ignore"):
        wanted = attention(size, feeds)
    for (found,) in everywhere(model, feeds).values():
        close(found, wanted)
        assert np.isfinite(found[:20]).all() and np.isfinite(found[50:]).all()


def test_large_scores() -> None:
    """What all scores of a query have in common changes nothing."""
    rng = seeded()
    size = Heads(3, 3, 20)
    model = model_of(size, bias="[heads, s, s]")
    feeds = feeds_of(model, [40, 7], rng)
    feeds["q"] *= 0
    shift = rng.integers(-(1 << 20), 1 << 20, (3, 40, 1))
    feeds["bias"] = (rng.integers(0, 4, (3, 40, 40)) + shift).astype(np.float32)
    for (found,) in everywhere(model, feeds).values():
        close(found, attention(size, feeds))


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [7, 0, 60], [300, 5], [1000]], ids=str)
def test_received(lengths: list[int]) -> None:
    rng = seeded()
    size = some_heads(rng)
    model = model_of(size, bool(rng.integers(2)), str(rng.choice(BIAS_SHAPES)), received=True)
    feeds = feeds_of(model, lengths, rng)
    wanted_context, wanted = attention_and_received(size, feeds)
    for context, found in everywhere(model, feeds).values():
        close(context, wanted_context)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-8)
        assert found.sum() == pytest.approx(sum(n > 0 for n in lengths), rel=1e-5)  # every query gives 1


def test_received_in_any_company() -> None:
    """What a sample receives is the same bits alone and in a batch."""
    rng = seeded()
    size = some_heads(rng)
    model = model_of(size, received=True)
    lengths = [int(n) for n in rng.integers(1, 400, 4)]
    feeds = feeds_of(model, lengths, rng)
    together = native(model).run(None, feeds)
    for start, end in itertools.pairwise(feeds["offsets"]):
        alone = {name: feeds[name][start:end] for name in ("q", "k", "v")} | {"offsets": np.int32([0, end - start])}
        for found, whole in zip(native(model).run(None, alone), together, strict=True):
            np.testing.assert_array_equal(found, whole[start:end])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    """Every number of threads gives the same bits."""
    rng = seeded()
    size = Heads(4, 2, 32)
    model = model_of(size)
    feeds = feeds_of(model, [int(n) for n in rng.integers(0, 200, 9)], rng)
    np.testing.assert_array_equal(native(model, threads).run(None, feeds)[0], native(model, 1).run(None, feeds)[0])


def test_the_body_in_half_precision() -> None:
    """It computes in float32; in and out are rounded."""
    rng = seeded()
    size = Heads(4, 2, 32)
    model = model_of(size, bias="[s, s]")
    feeds = feeds_of(model, [11, 0, 40], rng)
    names = [name for name in feeds if name != "offsets"]
    graph = graph_of(**{name: (feeds[name].dtype, list(feeds[name].shape)) for name in feeds})
    for tensor in graph.inputs:
        tensor.dtype = np.float16 if tensor.name in names else tensor.dtype
    half = feeds | {name: feeds[name].astype(np.float16) for name in names}
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    model = finish(graph, add_node(graph, PACKED_ATTENTION, inputs, "context", heads=4, kv_heads=2))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, half)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, attention(size, half), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("offsets", "why"),
    [([0, 5], "number of tokens"), ([1, 10], "from 0"), ([0, 7, 3, 10], "descend"), ([], "batch")],
)
def test_wrong_offsets(offsets: list[int], why: str) -> None:
    rng = seeded()
    model = model_of(Heads(2, 2, 8))
    feeds = feeds_of(model, [10], rng) | {"offsets": np.array(offsets, np.int32)}
    with pytest.raises(Exception, match=why):
        native(model).run(None, feeds)
