"""Graphs in ONNX text, with the names of `SHAPES` as random weights, and the parts that many of them have."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from seeds import seeded

from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.canonicalize import Canonicalize
from trimtab.passes.contract import PassContext

D, F = 8, 12
SHAPES = {
    "up": (D, F), "gate": (D, F), "down": (F, D), "wide": (D, 2 * F), "tall": (2 * F, D), "bw": (2 * F,),
    "g": (D,), "scale": (F,), "bu": (F,), "bd": (D,),
    "q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "qkv": (D, 3 * D), "narrow": (F, 3), "square": (D, D),
    "classes": (D, 3), "table": (40, D),
}  # fmt: skip


X, Y = f"float[B, T, {D}] x", "float[B, T, d] y"


def graph_of(body: str, inputs: str = X, outputs: str = Y, *, canonical: bool = True) -> gs.Graph:
    """The graph of ONNX text, by default after `canonicalize`."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
        f"agraph ({inputs}) => ({outputs}) <float half = {{0.5}}, float eps = {{0.00001}}, float two = {{2}}, "
        "int64[1] last = {-1}, int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, -1}, int64[3] rows = {0, -1, 8}, "
        f"int64[1] f0 = {{0}}, int64[1] f1 = {{{F}}}, int64[1] f2 = {{{2 * F}}}, int64 zero = {{0}}, "
        f"int64[1] less = {{{-F}}}, int64[1] most = {{9223372036854775807}}, int64[2] ff = {{{F}, {F}}}, "
        f"int64[1] two_ = {{2}}, int64[1] one_ = {{1}}> {{ {body} }}"
    )
    rng = seeded()
    used = {name for node in model.graph.node for name in node.input}
    for name in used & set(SHAPES):
        value = rng.standard_normal(SHAPES[name]).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}.{i}"
    graph = gs.import_onnx(model)
    if canonical:
        Canonicalize().run(graph, PassContext())
    return graph


def anatomy_of(body: str, inputs: str = X, outputs: str = Y) -> Anatomy:
    return find_anatomy(graph_of(body, inputs, outputs))


NORM = "n = LayerNormalization (x, g) "
PROJECTIONS = "a = MatMul (n, q) b = MatMul (n, k) c = MatMul (n, v) "
HEADS = (
    "qr = Reshape (a, split) qt = Transpose <perm = [0, 2, 1, 3]> (qr) kr = Reshape (b, split) "
    "vr = Reshape (c, split) vt = Transpose <perm = [0, 2, 1, 3]> (vr) "
)
PLAIN = (
    "kt = Transpose <perm = [0, 2, 3, 1]> (kr) s = MatMul (qt, kt) s2 = Mul (s, half) p = Softmax (s2) "
    "w = MatMul (p, vt) wt = Transpose <perm = [0, 2, 1, 3]> (w) r = Reshape (wt, join) "
)
OUT = "e = MatMul (r, o) y = Add (x, e)"


def tower(layers: int) -> gs.Graph:
    """Nothing but `layers` FFNs, of 4 inputs and 6 neurons, with their nodes in reverse order."""
    rng = seeded()
    x = gs.Variable("x", np.float32, ["N", 4])
    stream, nodes = x, []

    def node(op: str, *inputs: gs.Tensor) -> gs.Variable:
        made = gs.Variable(f"t{len(nodes)}", np.float32)
        nodes.append(gs.Node(op, inputs=list(inputs), outputs=[made]))
        return made

    def weight(*shape: int) -> gs.Constant:
        return gs.Constant(f"w{len(nodes)}.{shape}", rng.standard_normal(shape, np.float32))

    for _ in range(layers):
        hidden = node("Relu", node("MatMul", node("LayerNormalization", stream, weight(4)), weight(4, 6)))
        stream = node("Add", stream, node("MatMul", hidden, weight(6, 4)))
    return gs.Graph(nodes[::-1], inputs=[x], outputs=[stream], opset=20)
