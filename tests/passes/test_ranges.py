"""What graphs demand of their inputs' values: bounds of indices, and masks of which attention sees the sum alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from onnx import numpy_helper
from rewrite import canonical

from trimtab.passes.graph import load_graph
from trimtab.passes.graph.limits import Packed
from trimtab.passes.graph.ranges import index_bounds, packed_mask, safe_values

CACHED = Packed("attention_mask", "past_key_values.0.key", ("input_ids",))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_of_models(family: str, exporter: str) -> None:
    config = zoo.tiny_model(family).config
    inputs = {tensor.name: tensor for tensor in canonical(zoo.exported(family, exporter)).inputs}
    assert index_bounds(inputs["input_ids"]) == (0, config.vocab_size - 1)
    assert index_bounds(inputs["attention_mask"]) is None
    if "token_type_ids" in inputs:
        assert index_bounds(inputs["token_type_ids"]) == (0, config.type_vocab_size - 1)
    assert not any(packed_mask(tensor) for tensor in inputs.values())  # plain attention handles any mask


@pytest.mark.parametrize(("family", "exporter"), [*((family, "cached") for family in zoo.DECODERS), ("llama", "genai")])
def test_of_decoders(family: str, exporter: str) -> None:
    inputs = canonical(zoo.exported(family, exporter)).inputs
    assert [mask for tensor in inputs if (mask := packed_mask(tensor))] == [CACHED]
    bounds = {tensor.name: found for tensor in inputs if (found := index_bounds(tensor)) is not None}
    assert bounds == {"input_ids": (0, zoo.tiny_model(family).config.vocab_size - 1)}


def _graph(tmp_path: Path, inputs: str, body: str, **tables: int) -> dict[str, gs.Tensor]:
    """A graph whose constants `tables` have so many rows of width 3; `one` and `two` are scalars, `scale` a float."""
    opsets = '"" : 21, "com.microsoft" : 1'
    text = f"<ir_version: 10, opset_import: [{opsets}]> g ({inputs}) => (float[N] y) {{ {body} }}"
    model = onnx.parser.parse_model(text)
    for name, rows in tables.items():
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((rows, 3), np.float32), name))
    for name, value in (("one", 1), ("two", 2), ("fields", [0, 10]), ("zeros", [0]), ("ones", [1]), ("ends", [99])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    model.graph.initializer.append(numpy_helper.from_array(np.full((1, 3), 0.5, np.float32), "scale"))
    onnx.save(model, tmp_path / "model.onnx")
    return {tensor.name: tensor for tensor in load_graph(tmp_path / "model.onnx").inputs}


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        ("y = Gather (t, x)", (0, 9)),
        ("y = Gather <axis = -1> (t, x)", (0, 2)),
        ("a = Cast <to = 6> (x) b = Identity (a) y = Gather (t, b)", (0, 9)),
        ("a = Add (x, two) y = Gather (t, a)", (-2, 7)),
        ("a = Add (two, x) b = Sub (a, one) y = Gather (t, b)", (-1, 8)),
        ("a = Sub (x, two) y = Gather (t, a)", (2, 11)),
        ("y = Gather (t, x) z = Gather (u, x)", (0, 5)),  # each element indexes both
        ("a = Sub (two, x) y = Gather (t, a)", None),
        ("a = Add (x, fields) y = Gather (t, a)", None),  # another part of the table for each column
        ("a = Mul (x, two) y = Gather (t, a)", None),
        ("a = Cast <to = 9> (x) b = Cast <to = 7> (a) y = Gather (t, b)", None),
        ("a = Gather <axis = 1> (x, one) y = Gather (u, a)", None),  # one column of several
        ("y = Gather (x, one)", None),
        ("a = Cast <to = 10> (t) y = Gather (a, x)", (0, 9)),
        ("a = Transpose <perm = [1, 0]> (t) y = Gather (a, x)", (0, 2)),
        ("a = Transpose (t) b = Transpose (a) y = Gather (b, x)", (0, 9)),
        ("a = Mul (t, scale) y = Gather (a, x)", (0, 9)),
        ("a = Unsqueeze (x, two) y = GatherND (t, a)", (0, 9)),
        ("a = Concat <axis = -1> (x, x) y = GatherND (t, a)", None),  # of several axes
        ("a = Slice (x, zeros, ends, ones) y = Gather (t, a)", (0, 9)),
        ("a = Slice (x, ones, ends, ones) y = Gather (t, a)", None),  # the first may be anything
        ("a = Slice (x, zeros, ends, ones) y = Gather (t, a) z = Slice (x, ones, ends, ones)", None),
        ("a = Less (x, one) b = Where (a, one, x) y = Gather (t, b)", None),  # the graph maps them itself
    ],
)
def test_ways_to_a_table(body: str, bounds: tuple[int, int] | None, tmp_path: Path) -> None:
    assert index_bounds(_graph(tmp_path, "int64[B, T] x", body, t=10, u=6)["x"]) == bounds


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("y = Gather (t, x) z = Gather (u, x)", (0, 5)),
        ("a = Add (x, two) y = Gather (t, a)", (0, 7)),
        ("a = Sub (x, two) y = Gather (t, a)", (2, 11)),
        ("a = Slice (x, ones, ends, ones) y = Gather (t, a) b = Slice (x, zeros, ones) z = Gather (u, b)", (0, 5)),
        ("a = Less (x, one) b = Where (a, one, x) y = Gather (t, b)", (0, 9)),
        ("a = Gather <axis = 1> (x, one) y = Gather (u, a)", (0, 5)),
        ("a = Max (one, x) y = Gather (t, a)", (0, 9)),
        ("a = Mul (x, two) y = Gather (t, a)", None),
        ("y = Where (x, scale, scale)", None),
    ],
)
def test_values_that_every_table_takes(body: str, wanted: tuple[int, int] | None, tmp_path: Path) -> None:
    assert safe_values(_graph(tmp_path, "int64[B, T] x", body, t=10, u=6)["x"]) == wanted


def test_floats_that_are_cast_to_indices(tmp_path: Path) -> None:
    body = "a = Unsqueeze (x, one) b = Cast <to = 6> (a) c = Add (b, one) y = Gather (t, c)"
    assert index_bounds(_graph(tmp_path, "float[B, T] x", body.replace("(b, one)", "(b, b)"), t=10)["x"]) is None
    body = body.replace("<to = 6>", "<to = 7>")
    assert index_bounds(_graph(tmp_path, "float[B, T] x", body, t=10)["x"]) == (-1, 8)


def test_other_types_have_no_bounds(tmp_path: Path) -> None:
    assert index_bounds(_graph(tmp_path, "float[B, T] x", "y = Identity (x)")["x"]) is None


@pytest.mark.parametrize(
    ("body", "packed"),
    [
        ("n = ReduceSum (m, one) k = Sub (n, one) c = Cast <to = 6> (k) y = {gqa} (q, q, q, p, p, c, c)",
         Packed("m", "p")),
        ("h = Cast <to = 10> (p) n = ReduceSum (m, one) y = {gqa} (q, q, q, h, h, n, n)", Packed("m", "p")),
        ("h = Neg (p) n = ReduceSum (m, one) y = {gqa} (q, q, q, h, h, n, n)", None),
        ("n = ReduceSum (m, one) y = com.microsoft.Attention (q, q, q, n)", Packed("m", None)),
        ("n = ReduceSum (m, one) y = com.microsoft.MultiHeadAttention (q, q, q, q, n)", Packed("m", None)),
        ("y = com.microsoft.MultiHeadAttention (q, q, q, q, m)", None),
        ("n = ReduceSum (m, one) y = com.microsoft.MultiHeadAttention (q, q, q, n)", None),
    ],
)  # fmt: skip
def test_ways_to_lengths(body: str, packed: Packed | None, tmp_path: Path) -> None:
    body = body.format(gqa="com.microsoft.GroupQueryAttention")
    inputs = _graph(tmp_path, "int64[B, T] m, float[B, T, 8] q, float[B, 2, P, 4] p", body)
    assert packed_mask(inputs["m"]) == packed
    assert packed_mask(inputs["q"]) is None


@pytest.mark.parametrize("kind", ["bool", "int32", "int64", "float", "float16"])
@pytest.mark.parametrize("to", [1, 6, 7])
def test_masks_of_any_type_are_counted(kind: str, to: int, tmp_path: Path) -> None:
    body = f"w = Cast <to = {to}> (m) n = ReduceSum (w, ones) c = Sub (n, one) d = Cast <to = 6> (c) "
    body += "y = com.microsoft.GroupQueryAttention (q, q, q, p, p, d, d)"
    inputs = _graph(tmp_path, f"{kind}[B, T] m, float[B, T, 8] q, float[B, 2, P, 4] p", body)
    assert packed_mask(inputs["m"]) == Packed("m", "p")


def test_a_mask_goes_with_the_tokens_of_its_own_attention(tmp_path: Path) -> None:
    """Of two streams each has its ids; the second layer of one looks at the other, which changes nothing."""
    attention = "com.microsoft.MultiHeadAttention <num_heads = 1>"
    body = f"""
        e = Gather (t, x) f = Gather (u, z) n = ReduceSum (m, ones) k = ReduceSum (w, ones)
        a = {attention} (e, e, e, , n) b = {attention} (f, f, f, , k) c = Add (a, b)
        y = {attention} (c, c, c, , n)
    """
    inputs = _graph(tmp_path, "int64[B, T] x, int64[B, S] z, int64[B, T] m, int64[B, S] w", body, t=10, u=6)
    assert packed_mask(inputs["m"]) == Packed("m", None, ("x",))
    assert packed_mask(inputs["w"]) == Packed("w", None, ("z",))
