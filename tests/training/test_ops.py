"""Every operator against ONNX Runtime, on random inputs."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from seeds import seeded

from trimtab.training.ops import OPS
from trimtab.training.torch_graph import GraphModule

Make = Callable[[np.random.Generator], np.ndarray]

_TYPES = {"float32": "float", "float64": "double", "float16": "float16", "int64": "int64", "int32": "int32",
          "bool": "bool", "int8": "int8", "uint8": "uint8"}  # fmt: skip


def f(*shape: int) -> Make:
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> Make:
    return lambda rng: rng.uniform(0.1, 3, shape).astype(np.float32)


def i(*shape: int, low: int = -3, high: int = 3, dtype: str = "int64") -> Make:
    return lambda rng: rng.integers(low, high, shape).astype(dtype)


def b(*shape: int) -> Make:
    return lambda rng: rng.random(shape) < 0.5


def of(*values: int) -> Make:
    """These very values, int64."""
    return lambda rng: np.array(values, np.int64)


def scalar(value: float, dtype: str = "int64") -> Make:
    return lambda rng: np.array(value, dtype)


def run_both(body: str, opset: int = 24, **inputs: Make) -> list[tuple[np.ndarray, np.ndarray]]:
    """(torch's, ONNX Runtime's) value of every output of `body` that is called y, z or w."""
    rng = seeded()
    feeds = {name: make(rng) for name, make in inputs.items()}
    left = re.findall(r"([\w, ]+) = [\w.]+[<(]", body)[-1]
    outs = [name for name in left.strip().split(", ") if name in "yzw"]
    declared = ", ".join(f"{_TYPES[str(a.dtype)]}[{','.join(map(str, a.shape))}] {n}" for n, a in feeds.items())
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
        f"g ({declared}) => ({', '.join('float ' + o for o in outs)}) {{ {body} }}"
    )
    model = onnx.parser.parse_model(text)
    inferred = onnx.shape_inference.infer_shapes(_untyped(model))
    session = ort.InferenceSession(inferred.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(outs, feeds)
    have = GraphModule(gs.import_onnx(inferred))({name: torch.from_numpy(a) for name, a in feeds.items()})
    return [(have[name].numpy(), value) for name, value in zip(outs, want, strict=True)]


def _untyped(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with outputs of the types that inference finds, not those of the text."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for output in bare.graph.output:
        output.ClearField("type")
    found = {v.name: v for v in onnx.shape_inference.infer_shapes(bare).graph.output}
    for output in model.graph.output:
        if found[output.name].HasField("type"):
            output.CopyFrom(found[output.name])
        else:
            output.type.tensor_type.ClearField("shape")
    return model


def case(body: str, **inputs: Make) -> tuple[str, dict[str, Make]]:
    return body, inputs


CASES = {
    "Add": case("y = Add(a, b)", a=f(2, 3), b=f(3)),
    "Sub": case("y = Sub(a, b)", a=f(2, 3), b=f(2, 1)),
    "Mul": case("y = Mul(a, b)", a=f(2, 3), b=f()),
    "Div": case("y = Div(a, b)", a=f(2, 3), b=positive(2, 3)),
    "Div/int": case("y = Div(a, b)", a=of(-7, 7, -6, 5), b=of(2, 2, 4, 3)),
    "Pow": case("y = Pow(a, b)", a=positive(2, 3), b=scalar(2.5, "float32")),
    "Pow/int exponent": case("y = Pow(a, b)", a=f(2, 3), b=scalar(3)),
    "Mod": case("y = Mod(a, b)", a=of(-7, 7), b=of(3, 3)),
    "Mod/fmod": case("y = Mod<fmod = 1>(a, b)", a=f(5), b=positive(5)),
    "Max": case("y = Max(a, b, c)", a=f(2, 3), b=f(3), c=f(2, 1)),
    "Min": case("y = Min(a, b)", a=f(2, 3), b=f(3)),
    "Sum": case("y = Sum(a, b, c)", a=f(3), b=f(3), c=f(3)),
    **{op: case(f"y = {op}(a)", a=f(3, 4)) for op in (
        "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "Neg", "Relu",
        "Round", "Sigmoid", "Sign", "Sin", "Softplus", "Tan", "Tanh", "Size", "Dropout", "IsNaN", "IsInf",
    )},
    **{op: case(f"y = {op}(a)", a=positive(3, 4)) for op in ("Log", "Reciprocal", "Sqrt")},
    "Swish": case("y = Swish<alpha = 1.5>(a)", a=f(3, 4)),
    "Gelu/tanh": case('y = Gelu<approximate = "tanh">(a)', a=f(3, 4)),
    "Clip": case("y = Clip(a, low, high)", a=f(9), low=scalar(-0.5, "float32"), high=scalar(0.3, "float32")),
    "Clip/one side": case("y = Clip(a, , high)", a=f(9), high=scalar(0.3, "float32")),
    "Softmax": case("y = Softmax<axis = 1>(a)", a=f(2, 3, 4)),
    "LogSoftmax": case("y = LogSoftmax(a)", a=f(2, 3)),
    **{op: case(f"y = {op}(a, b)", a=i(3, 4), b=i(3, 4)) for op in (
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual",
    )},
    **{op: case(f"y = {op}(a, b)", a=b(3, 4), b=b(4)) for op in ("And", "Or", "Xor")},
    "Not": case("y = Not(a)", a=b(3)),
    "Where": case("y = Where(c, a, b)", c=b(2, 1), a=f(2, 3), b=f()),
    "Cast": case("y = Cast<to = 7>(a)", a=f(9)),
    "Cast/half": case("h = Cast<to = 10>(a) y = Cast<to = 1>(h)", a=f(9)),
    "CastLike": case("y = CastLike(a, b)", a=i(3), b=f(1)),
    "ReduceMean": case("y = ReduceMean(a, axes)", a=f(2, 3, 4), axes=of(-1, 0)),
    "ReduceMean/no axes": case("y = ReduceMean<keepdims = 0>(a)", a=f(2, 3)),
    "ReduceSum": case("y = ReduceSum<keepdims = 0>(a, axes)", a=f(2, 3, 4), axes=of(1)),
    "ReduceSum/nothing": case("y = ReduceSum<noop_with_empty_axes = 1>(a)", a=f(2, 3)),
    "ReduceSum/int": case("y = ReduceSum(a)", a=i(2, 3, dtype="int32")),
    "ReduceMax": case("y = ReduceMax(a, axes)", a=f(2, 3), axes=of(1)),
    "ReduceMin": case("y = ReduceMin(a, axes)", a=f(2, 3), axes=of(0)),
    "ReduceProd": case("y = ReduceProd(a, axes)", a=f(2, 3, 4), axes=of(0, 2)),
    "ReduceL2": case("y = ReduceL2(a, axes)", a=f(2, 3), axes=of(1)),
    "ReduceSumSquare": case("y = ReduceSumSquare(a, axes)", a=f(2, 3), axes=of(1)),
    "ArgMax": case("y = ArgMax<axis = 1, keepdims = 0>(a)", a=f(4, 5)),
    "ArgMax/last": case("y = ArgMax<axis = 1, select_last_index = 1>(a)", a=i(4, 9)),
    "CumSum": case("y = CumSum(a, axis)", a=f(3, 4), axis=scalar(1)),
    "CumSum/both": case("y = CumSum<exclusive = 1, reverse = 1>(a, axis)", a=f(3, 4), axis=scalar(0)),
    "MatMul": case("y = MatMul(a, b)", a=f(2, 1, 3, 4), b=f(5, 4, 6)),
    "Gemm": case("y = Gemm<alpha = 0.5, beta = 2.0, transA = 1, transB = 1>(a, b, c)", a=f(3, 2), b=f(4, 3), c=f(4)),
    "Gemm/no bias": case("y = Gemm(a, b)", a=f(2, 3), b=f(3, 4)),
    "Einsum": case('y = Einsum<equation = "bij,bjk->bik">(a, b)', a=f(2, 3, 4), b=f(2, 4, 5)),
    "Conv": case("y = Conv<strides = [4, 4], kernel_shape = [4, 4]>(a, w, c)",
        a=f(2, 3, 8, 12), w=f(5, 3, 4, 4), c=f(5)),
    "Conv/pads": case("y = Conv<pads = [1, 0, 2, 1], group = 2>(a, w)", a=f(1, 4, 6, 7), w=f(6, 2, 3, 3)),
    "Conv/1d": case("y = Conv<dilations = [2], pads = [2, 2]>(a, w)", a=f(1, 2, 9), w=f(3, 2, 3)),
    "LayerNormalization": case("y = LayerNormalization<epsilon = 0.001>(a, s, c)", a=f(2, 3, 8), s=f(8), c=f(8)),
    "LayerNormalization/two axes": case("y = LayerNormalization<axis = 1>(a, s)", a=f(2, 3, 8), s=f(3, 8)),
    "RMSNormalization": case("y = RMSNormalization<epsilon = 0.001>(a, s)", a=f(2, 3, 8), s=f(8)),
    "SimplifiedLayerNormalization": case("y = SimplifiedLayerNormalization<epsilon = 0.001>(a, s)", a=f(2, 8), s=f(8)),
    "Shape": case("y = Shape(a)", a=f(2, 3, 4)),
    "Shape/part": case("y = Shape<start = 1, end = -1>(a)", a=f(2, 3, 4)),
    "Reshape": case("y = Reshape(a, s)", a=f(2, 3, 4), s=of(0, -1)),
    "Reshape/allowzero": case("y = Reshape<allowzero = 1>(a, s)", a=f(0, 3), s=of(3, 0)),
    "Flatten": case("y = Flatten<axis = 2>(a)", a=f(2, 3, 4, 5)),
    "Transpose": case("y = Transpose<perm = [0, 2, 1]>(a)", a=f(2, 3, 4)),
    "Transpose/reverse": case("y = Transpose(a)", a=f(2, 3, 4)),
    "Squeeze": case("y = Squeeze(a, axes)", a=f(1, 3, 1), axes=of(-1)),
    "Squeeze/all": case("y = Squeeze(a)", a=f(1, 3, 1)),
    "Unsqueeze": case("y = Unsqueeze(a, axes)", a=f(3, 4), axes=of(-1, 0)),
    "Expand": case("y = Expand(a, s)", a=f(3, 1), s=of(2, 1, 4)),
    "Tile": case("y = Tile(a, r)", a=f(2, 3), r=of(2, 1)),
    "Concat": case("y = Concat<axis = -1>(a, b)", a=f(2, 3), b=f(2, 4)),
    "Split": case("y, z = Split<axis = 1>(a, s)", a=f(2, 5), s=of(2, 3)),
    "Split/equal": case("y, z = Split<axis = 1, num_outputs = 2>(a)", a=f(2, 5)),
    "Slice": case("y = Slice(a, s, e, axes, t)",
        a=f(6, 7), s=of(1, -1), e=of(2**62, -(2**62)), axes=of(0, 1), t=of(2, -2)),
    "Slice/no axes": case("y = Slice(a, s, e)", a=f(6, 7), s=of(-2, 5), e=of(-1, 2)),
    "Gather": case("y = Gather(a, n)", a=f(5, 3), n=i(2, 4)),
    "Gather/axis": case("y = Gather<axis = 1>(a, n)", a=f(2, 5, 3), n=i(2, 4)),
    "Gather/scalar": case("y = Gather<axis = 1>(a, n)", a=f(2, 5, 3), n=scalar(-2)),
    "GatherElements": case("y = GatherElements<axis = 1>(a, n)", a=f(3, 4), n=i(3, 2)),
    "GatherND": case("y = GatherND(a, n)", a=f(4, 4, 3), n=i(5, 2)),
    "GatherND/batch": case("y = GatherND<batch_dims = 1>(a, n)", a=f(2, 4, 4, 3), n=i(2, 6, 2)),
    "ScatterElements": case("y = ScatterElements<axis = 1>(a, n, u)",
        a=f(1, 4), n=lambda r: np.array([[3, -3]]), u=f(1, 2)),
    "ScatterND": case("y = ScatterND(a, n, u)", a=f(4, 3), n=lambda r: np.array([[2], [0]]), u=f(2, 3)),
    "Range": case("y = Range(a, b, c)", a=scalar(2), b=scalar(11), c=scalar(3)),
    "Trilu": case("y = Trilu<upper = 0>(a, k)", a=f(2, 4, 5), k=scalar(-1)),
    "Trilu/upper": case("y = Trilu(a)", a=f(4, 5)),
    "ConstantOfShape": case("y = ConstantOfShape<value = int64[1] {7}>(s)", s=of(2, 3)),
    "ConstantOfShape/zero": case("y = ConstantOfShape(s)", s=of(2, 3)),
    "Constant": case("c = Constant<value_floats = [1.0, 2.0]>() y = Add(a, c)", a=f(2)),
    "Constant/int": case("c = Constant<value_int = 3>() y = Add(a, c)", a=i(2)),
    "Constant/tensor": case("c = Constant<value = float[2] {1.0, 2.0}>() y = Add(a, c)", a=f(2)),
    "Pad": case("y = Pad(a, p, v, axes)", a=f(2, 3, 4), p=of(1, 0, 2, 3), v=scalar(0.5, "float32"), axes=of(0, -1)),
    "Pad/all": case("y = Pad(a, p)", a=f(2, 3), p=of(0, 1, 2, 0)),
    "TopK": case("y, z = TopK<axis = 1>(a, k)", a=f(4, 9), k=of(3)),
    "TopK/smallest": case("y, z = TopK<axis = 0, largest = 0>(a, k)", a=f(9, 4), k=of(2)),
    "Attention": case("y = Attention(q, k, v)", q=f(2, 3, 4, 8), k=f(2, 3, 5, 8), v=f(2, 3, 5, 6)),
    "Attention/mask": case("y = Attention<scale = 0.3>(q, k, v, m)",
        q=f(2, 3, 4, 8), k=f(2, 3, 5, 8), v=f(2, 3, 5, 8), m=f(4, 5)),
    "Attention/flat, causal, shared heads": case(
        "y = Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>(q, k, v)",
        q=f(2, 5, 32), k=f(2, 5, 16), v=f(2, 5, 16)),
    "Attention/cache": case("y, z, w = Attention(q, k, v, , pk, pv)",
        q=f(2, 3, 2, 8), k=f(2, 3, 2, 8), v=f(2, 3, 2, 8), pk=f(2, 3, 4, 8), pv=f(2, 3, 4, 8)),
    "RotaryEmbedding": case("y = RotaryEmbedding(a, c, s, p)",
        a=f(2, 3, 5, 8), c=f(9, 4), s=f(9, 4), p=i(2, 5, low=0, high=9)),
    "RotaryEmbedding/flat, part, interleaved": case(
        "y = RotaryEmbedding<num_heads = 3, rotary_embedding_dim = 4, interleaved = 1>(a, c, s)",
        a=f(2, 5, 24), c=f(2, 5, 2), s=f(2, 5, 2)),
    "DequantizeLinear": case("y = DequantizeLinear<axis = 0>(a, s, n)",
        a=i(4, 6, low=0, high=255, dtype="uint8"), s=positive(4), n=i(4, low=0, high=255, dtype="uint8")),
    "DequantizeLinear/tensor": case("y = DequantizeLinear(a, s)", a=i(4, 6, dtype="int8"), s=positive()),
    "DequantizeLinear/blocks": case("y = DequantizeLinear<axis = 1, block_size = 4>(a, s)",
        a=i(3, 8, dtype="int8"), s=positive(3, 2)),
    "microsoft MatMulNBits": case("y = com.microsoft.MatMulNBits<K = 32, N = 6, bits = 4, block_size = 16>(a, q, s)",
        a=f(2, 3, 32), q=i(6, 2, 8, low=0, high=255, dtype="uint8"), s=positive(6, 2)),
    "microsoft MatMulNBits/8": case("y = com.microsoft.MatMulNBits<K = 32, N = 6, bits = 8, block_size = 32>(a, q, s)",
        a=f(2, 3, 32), q=i(6, 1, 32, low=0, high=255, dtype="uint8"), s=positive(6, 1)),
    "microsoft BiasGelu": case("y = com.microsoft.BiasGelu(a, c)", a=f(2, 3, 8), c=f(8)),
    "microsoft FastGelu": case("y = com.microsoft.FastGelu(a, c)", a=f(2, 3, 8), c=f(8)),
    "microsoft Gelu": case("y = com.microsoft.Gelu(a)", a=f(2, 8)),
    "microsoft QuickGelu": case("y = com.microsoft.QuickGelu<alpha = 1.702>(a)", a=f(2, 8)),
    "microsoft SkipLayerNormalization": case(
        "y = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(a, b, s, c, d)",
        a=f(2, 3, 8), b=f(2, 3, 8), s=f(8), c=f(8), d=f(8)),
    "microsoft SkipSimplifiedLayerNormalization": case(
        "y, z1, z2, z = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.001>(a, b, s)",
        a=f(2, 3, 8), b=f(2, 3, 8), s=f(8)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operator_as_in_onnx_runtime(case: str) -> None:
    body, inputs = CASES[case]
    for have, want in run_both(body, **inputs):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        largest = np.abs(want).max(initial=0) if want.dtype.kind == "f" else 0
        atol = 2e-3 if "half" in case else max(1e-5, 2e-7 * float(largest))  # terms that cancel leave their rounding
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=atol)


def test_older_opsets_with_attributes() -> None:
    ((have, want),) = run_both("y = ReduceMean<axes = [1], keepdims = 0>(a)", opset=17, a=f(2, 3, 4))
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
    ((have, want),) = run_both("y = LayerNormalization(a, s, c)", opset=17, a=f(2, 8), s=f(8), c=f(8))
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)


def test_every_operator_is_tested() -> None:
    called = (name for body, _ in CASES.values() for name in re.findall(r"= ([\w.]+)[<(]", body))
    tested = {tuple(name.rpartition(".")[::2]) for name in called}
    covered = {("com.microsoft", "SimplifiedLayerNormalization")}  # the same function as in the main domain
    covered |= {("com.microsoft", "GroupQueryAttention")}  # tested as part of a model, in test_torch_graph.py
    assert set(OPS) - covered <= tested
