"""Blocks written in unusual ways, and what is said of those that are not recognised."""

from __future__ import annotations

import pytest
from written import HEADS, NORM, OUT, PLAIN, PROJECTIONS, D, F, anatomy_of


@pytest.mark.parametrize(
    ("body", "gated", "activation"),
    [
        (NORM + "u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) y = Add (x, d)", False, "relu"),
        (NORM + "u = MatMul (n, up) h = LeakyRelu (u) d = MatMul (h, down) y = Add (d, x)", False, "unknown"),
        (NORM + "u = MatMul (n, up) s = Add (u, bu) h = Tanh (s) d = MatMul (h, down) e = Add (bd, d) y = Add (e, x)",
         False, "tanh"),
        (NORM + "a = MatMul (n, gate) u = MatMul (n, up) s = Sigmoid (a) h = Mul (u, s) d = MatMul (h, down) "
         "y = Add (x, d)", True, "sigmoid"),
        (NORM + "a = MatMul (n, gate) u = MatMul (n, up) h = Mul (u, a) d = MatMul (h, down) y = Add (x, d)",
         True, "identity"),
        # BiasGelu, and a skip norm that adds the bias of the down projection, as ONNX Runtime's optimizer writes BERT
        ("u = MatMul (x, up) h = com.microsoft.BiasGelu (u, bu) d = MatMul (h, down) "
         "y = com.microsoft.SkipLayerNormalization (d, x, g, g, bd)", False, "gelu"),
        # a norm after the block and a half step
        (NORM + "u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) e = RMSNormalization (d, g) f = Mul (half, e) "
         "y = Add (x, f)", False, "relu"),
        # parallel to something else, which joins the stream first
        (NORM + "u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) p = Sin (n) s = Add (p, d) y = Add (s, x)",
         False, "relu"),
        # half precision inside
        (NORM + "u = MatMul (n, up) c = Cast <to = 10> (u) r = Relu (c) h = Cast <to = 1> (r) d = MatMul (h, down) "
         "y = Add (x, d)", False, "relu"),
    ],
)  # fmt: skip
def test_ffns(body: str, gated: bool, activation: str) -> None:
    anatomy = anatomy_of(body)
    assert len(anatomy.ffns) == 1
    ffn = anatomy.ffns[0]
    assert (ffn.gated, ffn.activation.name, ffn.d_model, ffn.d_ff) == (gated, activation, D, F)
    assert ffn.activation.output is ffn.down.x
    assert [t.name for t in ffn.activation.inputs] == [linear.y.name for linear in ffn.linears[:-1]]
    assert anatomy.unrecognized == ()


@pytest.mark.parametrize(
    ("body", "where", "why"),
    [
        ("u = MatMul (n, up) s = Mul (u, scale) h = Relu (s) d = MatMul (h, down) y = Add (x, d)",
         "Mul.2", "a constant of 12 values"),
        ("u = MatMul (n, up) h = LayerNormalization (u, scale) r = Relu (h) d = MatMul (r, down) y = Add (x, d)",
         "LayerNormalization.2", "not a known elementwise op"),
        ("m = Sin (n) a = MatMul (n, gate) u = MatMul (m, up) s = Sigmoid (a) h = Mul (s, u) d = MatMul (h, down) "
         "y = Add (x, d)", "Sigmoid.4", "read different inputs"),
        ("a = MatMul (n, gate) u = MatMul (n, up) s = Sigmoid (a) h = Add (s, u) d = MatMul (h, down) y = Add (x, d)",
         "Add.4", "not combined as act"),
        ("a = MatMul (n, gate) u = MatMul (n, up) c = MatMul (n, up) s = Sigmoid (a) h = Mul (s, u) i = Mul (h, c) "
         "d = MatMul (i, down) y = Add (x, d)", "MatMul.7", "3 projections"),
        # packed, and not by halves: every other feature is the gate's
        ("w = MatMul (n, wide) a = Slice (w, f0, f2, last, two_) u = Slice (w, one_, f2, last, two_) s = Sigmoid (a) "
         "h = Mul (s, u) d = MatMul (h, down) y = Add (x, d)", "Slice", "packed into one"),
        ("u = MatMul (n, up) a = Cast <to = 7> (u) b = Cast <to = 1> (a) h = Relu (b) d = MatMul (h, down) "
         "y = Add (x, d)", "Cast.2", "not a known elementwise op"),
        ("u = MatMul (n, up) h = Relu (u) y = MatMul (h, down)", "MatMul.3", "not added to a residual stream"),
        ("u = MatMul (n, up) h = Relu (u) y = MatMul (h, narrow)", "MatMul.3", "it maps 8 features to 3"),
    ],
)  # fmt: skip
def test_why_not(body: str, where: str, why: str) -> None:
    anatomy = anatomy_of(NORM + body)
    assert anatomy.ffns == ()
    assert len(anatomy.unrecognized) == 1
    found = anatomy.unrecognized[0]
    assert found.what == "FFN"
    assert found.where.startswith(where)
    assert why in found.why


def test_an_input_in_the_middle() -> None:
    anatomy = anatomy_of(
        NORM + "u = MatMul (n, up) r = Relu (u) h = Mul (r, m) d = MatMul (h, down) y = Add (x, d)",
        inputs=f"float[B, T, {D}] x, float[B, T, {F}] m",
    )
    assert "'m', an input of the graph" in anatomy.unrecognized[0].why


def test_quantized_products_are_named() -> None:
    anatomy = anatomy_of(
        "a, s, z = DynamicQuantizeLinear (x) b, t, w = DynamicQuantizeLinear (square) "
        "i = MatMulInteger (a, b, z, w) y = Cast <to = 1> (i)"
    )
    assert anatomy.unrecognized[0].what == "MatMulInteger"
    assert "before quantization" in anatomy.unrecognized[0].why


def test_activations_between_quantize_and_dequantize_are_named() -> None:
    """Not weights in integers, whose DequantizeLinear reads a constant: those products are as good as dense."""
    half = "i8 = QuantizeLinear (n, eps, zero_) f8 = DequantizeLinear (i8, eps, zero_) "
    body = "u = MatMul ({0}, up) h = Relu (u) d = MatMul (h, down) y = Add (x, d)"
    zero = "zero_ = Constant <value = uint8 {128}> () "
    anatomy = anatomy_of(zero + NORM + half + body.format("f8"))
    assert (anatomy.unrecognized[0].what, anatomy.unrecognized[0].where) == ("MatMul", "MatMul.4")
    assert "1 products whose activations are quantized" in anatomy.unrecognized[0].why
    assert anatomy_of(NORM + body.format("n")).unrecognized == ()


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_layers_in_branches_and_loops_are_named(op: str) -> None:
    layers = "u{0} = MatMul (x, up) h{0} = Relu (u{0}) d{0} = MatMul (h{0}, down) y{0} = Add (x, d{0})"
    outer = (
        "p = Identity (up) r = Identity (down) keep = Constant <value = bool {1}> () "
        "twice = Constant <value = int64 {2}> () "
    )
    if op == "If":
        a, b = (f"b{i} () => (float[B, T, {D}] y{i}) {{ {layers.format(i)} }}" for i in (0, 1))
        body = outer + f"y = If (keep) <then_branch = {a}, else_branch = {b}>"
    else:
        inside = layers.format(0) + " on = Identity (c)"
        loop = f"l (int64 i, bool c, float[B, T, {D}] x) => (bool on, float[B, T, {D}] y0) {{ {inside} }}"
        body = outer + f"y = Loop (twice, keep, x) <body = {loop}>"
    (found,) = anatomy_of(body).unrecognized
    count, where = (4, "branches") if op == "If" else (2, "body")
    assert found.what == op and found.why.startswith(f"{count} products with weights are in its {where}")


BLOCK = (
    "n = LayerNormalization (x, g) u = MatMul (n, up) h = Relu (u) d = MatMul (h, down) z = Add (x, d) "
    "m = LayerNormalization (z, g) "
)


def test_heads_are_no_ffns() -> None:
    anatomy = anatomy_of(BLOCK + "p = MatMul (m, square) t = Tanh (p) y = MatMul (t, classes)")
    assert len(anatomy.ffns) == 1
    assert anatomy.head is not None
    assert [linear.out_features for linear in anatomy.head.linears] == [D, 3]
    assert anatomy.unrecognized == ()


def test_a_projection_between_blocks_is_named() -> None:
    anatomy = anatomy_of(
        BLOCK + "p = MatMul (m, square) u2 = MatMul (p, up) h2 = Relu (u2) d2 = MatMul (h2, down) y = Add (z, d2)"
    )
    assert len(anatomy.ffns) == 2
    assert [(u.what, u.where) for u in anatomy.unrecognized] == [(f"projection {D} -> {D}", "MatMul.6")]


CAPPED = PLAIN.replace("p = Softmax (s2)", "t = Tanh (s2) s3 = Mul (t, two) p = Softmax (s3)")


@pytest.mark.parametrize(
    ("body", "fused", "packed"),
    [
        (PROJECTIONS + HEADS + PLAIN + OUT, None, False),
        (PROJECTIONS + HEADS + CAPPED + OUT, None, False),
        ("w3 = MatMul (n, qkv) a, b, c = Split <axis = 2, num_outputs = 3> (w3) " + HEADS + PLAIN + OUT, None, True),
        (PROJECTIONS + HEADS + "kt = Transpose <perm = [0, 2, 1, 3]> (kr) w = Attention (qt, kt, vt) "
         "wt = Transpose <perm = [0, 2, 1, 3]> (w) r = Reshape (wt, join) " + OUT, "Attention", False),
        (PROJECTIONS + "r = Attention <q_num_heads = 2, kv_num_heads = 2> (a, b, c) " + OUT, "Attention", False),
        (PROJECTIONS + "r = com.microsoft.MultiHeadAttention <num_heads = 2> (a, b, c) " + OUT,
         "MultiHeadAttention", False),
        ("r = com.microsoft.Attention <num_heads = 2> (n, qkv) " + OUT, "Attention", None),
    ],
)  # fmt: skip
def test_attentions(body: str, fused: str | None, packed: bool | None) -> None:
    anatomy = anatomy_of(NORM + body)
    assert len(anatomy.attentions) == 1
    attention = anatomy.attentions[0]
    assert attention.fused == fused
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (2, 2, 4)
    assert attention.out is not None
    if packed is None:  # the op holds the weights itself
        assert (attention.q, attention.k, attention.v) == (None, None, None)
    else:
        assert (attention.q is attention.k is attention.v) == packed
        if not packed:
            assert len({id(m.weight) for m in (attention.q, attention.k, attention.v, attention.out) if m}) == 4
    assert anatomy.unrecognized == ()


def test_a_softmax_over_classes_is_no_attention() -> None:
    anatomy = anatomy_of(BLOCK + "p = MatMul (m, classes) y = Softmax (p)")
    assert anatomy.attentions == ()
    assert anatomy.unrecognized == ()


@pytest.mark.parametrize(
    "body",
    [
        "y = LayerNormalization (x, g)",
        "y = RMSNormalization (x, g)",
        "y = SimplifiedLayerNormalization (x, g)",
        "a = Pow (x, two) b = ReduceMean (a, last) c = Add (b, eps) d = Sqrt (c) e = Div (x, d) y = Mul (e, g)",
        "a = Mul (x, x) b = ReduceMean (a, last) c = Add (b, eps) d = Sqrt (c) e = Reciprocal (d) f = Mul (x, e) "
        "y = Mul (f, g)",
        "m = ReduceMean (x, last) s = Sub (x, m) a = Pow (s, two) b = ReduceMean (a, last) c = Add (b, eps) "
        "d = Sqrt (c) e = Div (s, d) y = Mul (e, g)",
    ],
)
def test_norms(body: str) -> None:
    assert len(anatomy_of(body).norms) == 1


def test_embeddings() -> None:
    anatomy = anatomy_of(
        "e = Gather (table, ids) one = Gather (table, zero) s = Add (e, one) y = Relu (s)", inputs="int64[B, T] ids"
    )
    assert [tuple(e.table.shape) for e in anatomy.embeddings] == [(40, D)]
    assert anatomy.params == 40 * D


def test_a_norm_before_the_down_projection() -> None:
    """No FFN, and no head either, though it comes last."""
    anatomy = anatomy_of(
        NORM + PROJECTIONS + HEADS + PLAIN + "e = MatMul (r, o) z = Add (x, e) u = MatMul (z, up) h = Relu (u) "
        "l = LayerNormalization (h, scale) d = MatMul (l, down) y = Add (z, d)"
    )
    assert anatomy.ffns == ()
    assert [u.what for u in anatomy.unrecognized] == [f"projection {F} -> {D}"]


def test_nothing_there() -> None:
    anatomy = anatomy_of("y = Relu (x)")
    assert (anatomy.layers, anatomy.family, anatomy.head, anatomy.unrecognized) == (0, "unknown", None, ())
