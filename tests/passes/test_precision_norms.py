"""LayerNorms and RMSNorms that an exporter spelled out, in half precision and behind ONNX Runtime's own fusions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from half import in_half, parsed
from seeds import seeded

from trimtab.passes.graph import save_graph

TYPES = ("float16", "bfloat16")
FLOAT = np.float32
LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")

LAYER: dict[str, str] = {
    "pow": "d = Sub (h, u)  e = Identity (d)  q = Pow (d, two)",
    "mul": "d = Sub (h, u)  e = Identity (d)  q = Mul (d, d)",
    "twice": "d = Sub (h, u)  e = Sub (h, u)  q = Pow (d, two)",  # DeBERTa
    "casts": "d = Sub (h, u)  e = Cast <to = 1> (d)  c = Cast <to = 1> (d)  q = Pow (c, two)",
    "wide": "d = Sub (h, u)  e = Identity (d)  q = Pow (d, row)",  # the exponent has axes
}
TAILS: dict[str, str] = {
    "scale, bias": "s = Mul (n, g)  y = Add (s, b)",
    "others first": "s = Mul (g, n)  y = Add (b, s)",
    "scale": "y = Mul (n, g)",
    "bias": "y = Add (n, b)",
    "none": "y = Identity (n)",
    "one number": "s = Mul (n, half)  y = Add (s, half)",
    "of a row each": "s = Mul (n, row)  y = Add (s, b)",
    "computed": "g2 = Mul (h, g)  s = Mul (n, g2)  y = Add (s, b)",
    "read twice": "s = Mul (n, g)  a = Add (s, b)  y = Add (a, n)",
    "mean read": "s = Mul (n, g)  a = Add (s, b)  y = Add (a, u)",
}


def outputs_at_all_levels(path: Path, given: dict[str, np.ndarray], kind: str) -> list[np.ndarray]:
    """What the graph in half precision gives, at each level of ONNX Runtime's optimizations."""
    made = []
    for level in LEVELS if kind == "float16" else LEVELS[:1]:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
        file = path / ("half.onnx" if kind == "float16" else "emulated.onnx")
        made.append(ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"]).run(None, given)[0])
    return made


def check(text: str, folder: Path, kind: str, rng: np.random.Generator, *, opset: int = 17, **options: Any) -> set[str]:
    """Compare `text`, of one input x [r, 8, 48], with itself in float32. Returns the ops made."""
    weights: dict[str, np.ndarray] = {
        "g": rng.normal(1, 0.2, 48), "b": rng.normal(0, 0.2, 48), "w": rng.normal(size=(48, 48)) / 7,
        "two": np.array(2), "half": np.array(0.5), "row": np.full((1, 1, 1), 2),
        "eps": options.pop("eps", np.array(1e-5)),
    }  # fmt: skip
    constants = {key: np.asarray(array, FLOAT) for key, array in weights.items()}
    if opset >= 18:
        constants["last"] = np.array(options.pop("axes", [-1]))
    text = text.replace("MEAN", "ReduceMean <axes = [-1]>" if opset < 18 else "ReduceMean")
    text = text.replace("LAST", "" if opset < 18 else ", last")
    graph = parsed(text, opset, **{key: array for key, array in constants.items() if key in text or key == "w"})
    x = rng.normal(0.3, rng.uniform(0.1, 3), (3, 8, 48)).astype(FLOAT)
    before = folder / "before.onnx"
    save_graph(graph, before)
    (want,) = ort.InferenceSession(str(before), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    in_half(graph, folder, type=kind, **options)
    allowed = 0.004 if kind == "float16" else 0.03
    for got in outputs_at_all_levels(folder, {"x": x}, kind):
        assert float(np.linalg.norm(got - want) / np.linalg.norm(want)) < allowed
    return {node.op_type for node in onnx.load(str(folder / "half.onnx")).graph.node}


def layer(square: str, tail: str = "scale, bias", more: str = "Add (v, eps)", product: bool = True) -> str:
    """A graph of one LayerNorm between two products, or at the graph's ends."""
    before, after = ("h = MatMul (x, w)", "z = MatMul (y, w)") if product else ("h = Identity (x)", "z = Identity (y)")
    return f"""g (float[r, 8, 48] x) => (float[r, 8, 48] z) {{ {before}  u = MEAN (hLAST)  {LAYER[square]}
        v = MEAN (qLAST)  m = {more}  sd = Sqrt (m)  n = Div (e, sd)  {TAILS[tail]}  {after} }}"""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("square", LAYER)
def test_layer_norms_are_one_op(tmp_path: Path, square: str, kind: str) -> None:
    rng = seeded()
    for opset in (13, 17, 18):
        for product in (True, False):
            more = "Add (v, eps)" if rng.integers(2) else "Add (eps, v)"
            eps = np.array(rng.choice([1e-5, 1e-7, 1e-12]))
            eps = eps.reshape(1) if rng.integers(2) else eps
            ops = check(layer(square, more=more, product=product), tmp_path, kind, rng, opset=opset, eps=eps)
            assert "LayerNormalization" in ops and not ops & {"Sqrt", "ReduceMean", "Sub", "Div"}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tail", TAILS)
def test_scales_and_biases(tmp_path: Path, tail: str, kind: str) -> None:
    """A scale or bias that the op does not take stands behind it."""
    rng = seeded()
    for square in ("pow", "twice"):
        assert "LayerNormalization" in check(layer(square, tail), tmp_path, kind, rng)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("axes", [[-1], [2], [2, 1], [-2, -1], [1], [0, 2]])
def test_axes(tmp_path: Path, axes: list[int], kind: str) -> None:
    """The last axes are what the op knows; other norms stay spelled out, and right."""
    fits = set(axes) in ({-1}, {2}, {1, 2}, {-1, -2})
    ops = check(layer("pow"), tmp_path, kind, seeded(), opset=18, axes=axes)
    assert ("LayerNormalization" in ops) == fits


@pytest.mark.parametrize("square", ["pow", "twice", "casts"])
@pytest.mark.parametrize("keep", ["Sqrt", "Div", "Sub", "Pow", "Add", "Mul", "ReduceMean", "LayerNormalization"])
def test_norms_with_an_op_to_keep_open(tmp_path: Path, keep: str, square: str) -> None:
    """They stay in float32, and ONNX Runtime finds nothing to fuse."""
    rng = seeded()
    for product in (True, False):
        ops = check(layer(square, product=product), tmp_path, "float16", rng, keep=[keep])
        assert ("Sqrt" in ops) == (keep != "LayerNormalization")
        inferred = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "half.onnx"))).graph
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        assert all(types[n.output[0]] == onnx.TensorProto.FLOAT for n in inferred.node if n.op_type in ("Sqrt", "Div"))


@pytest.mark.parametrize("square", LAYER)
def test_norms_over_an_unknown_size_open(tmp_path: Path, square: str) -> None:
    text = layer(square).replace("[r, 8, 48] x", "[r, 8, n] x")
    text = text.replace("h = MatMul (x, w)", "p = MatMul (x, w)  k = Shape (x)  h = Reshape (p, k)")
    assert "Sqrt" in check(text, tmp_path, "float16", seeded())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "root", ["n = Div (h, sd)", "i = Reciprocal (sd)  n = Mul (h, i)", "i = Div (one, sd)  n = Mul (h, i)"]
)
def test_root_mean_squares(tmp_path: Path, root: str, kind: str) -> None:
    rng = seeded()
    for tail in ("scale", "scale, bias", "others first", "computed"):
        for square in ("Pow (h, two)", "Mul (h, h)"):
            for before in ("h = MatMul (x, w)", "h = Identity (x)"):
                text = f"""g (float[r, 8, 48] x) => (float[r, 8, 48] z) {{ one = Constant <value = float {{1.0}}> ()
                    {before}  q = {square}  v = MEAN (qLAST)  m = Add (v, eps)  sd = Sqrt (m)  {root}
                    {TAILS[tail]}  z = MatMul (y, w) }}"""
                check(text, tmp_path, kind, rng, opset=int(rng.choice([17, 18])))


@pytest.mark.parametrize("kind", TYPES)
def test_a_stack_as_of_deberta(tmp_path: Path, kind: str) -> None:
    """Norms before and after residuals: the result of one is read by the products and by the next sum."""

    def norm(source: str, name: str) -> str:
        return f"""{name}u = MEAN ({source}LAST)  {name}d = Sub ({source}, {name}u)  {name}e = Sub ({source}, {name}u)
            {name}q = Pow ({name}e, two)  {name}v = MEAN ({name}qLAST)  {name}m = Add ({name}v, eps)
            {name}s = Sqrt ({name}m)  {name}n = Div ({name}d, {name}s)  {name}g = Mul (g, {name}n)
            {name} = Add ({name}g, b)"""

    blocks, state = [norm("x", "l0_")], "l0_"
    for i in (1, 2, 3):
        blocks.append(f"p{i} = MatMul ({state}, w)  a{i} = Tanh (p{i})  o{i} = MatMul (a{i}, w)")
        blocks.append(f"r{i} = Add (o{i}, {state})  " + norm(f"r{i}", f"l{i}_"))
        state = f"l{i}_"
    text = f"g (float[r, 8, 48] x) => (float[r, 8, 48] z) {{ {'  '.join(blocks)}  z = MatMul ({state}, w) }}"
    ops = check(text, tmp_path, kind, seeded(), eps=np.array(1e-7))
    assert "LayerNormalization" in ops and not ops & {"Sqrt", "Pow", "Div"}
