"""Lowers com.microsoft GroupQueryAttention and RotaryEmbedding to standard ops.

The cache grows by concatenation, and the graph's mask marks its real tokens. ONNX Runtime's op overwrites the padding
behind a shorter prompt instead: keys and values are stored at other positions, but the output is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import ModelError
from trimtab.plugins.lowering import Nodes, onnx_type, type_of

_OPTIONS = {
    "num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved",
    "smooth_softmax", "qk_output", "k_quant_type", "v_quant_type", "kv_cache_bit_width",
}  # fmt: skip
_PLAIN = {"smooth_softmax": (0, -1), "qk_output": (0,), "kv_cache_bit_width": (0,)}
"""Options of which only these values are supported."""
_MASKED = -1e4  # added to masked scores: exp of it is 0 in every type, and it is finite in half precision


@dataclass
class Masks:
    """The additive masks that the attention of all layers shares, each created at its first use.

    Attributes:
        mask: the graph's input [batch, past + tokens], 1 for real tokens.
        ids: the graph's input [batch, tokens], if it has one: sizes are best read from inputs.
        cache: (groups, window, type) → mask.
    """

    mask: gs.Tensor
    ids: gs.Tensor | None
    cache: dict[tuple[int, int, str], gs.Tensor]

    @classmethod
    def of(cls, graph: gs.Graph) -> Masks:
        flat = {t.name: t for t in graph.inputs if t.shape is not None and len(t.shape) == 2}
        if "attention_mask" not in flat:
            raise ModelError(
                "GroupQueryAttention needs an input attention_mask [batch, past + tokens], and the graph has none",
                hint="export the model again, with `trimtab compile MODEL` or ONNX Runtime GenAI's builder",
            )
        return cls(flat["attention_mask"], flat.get("input_ids"), {})

    def __call__(self, nodes: Nodes, tokens: gs.Tensor, groups: int, window: int, dtype: np.dtype) -> gs.Tensor:
        """The additive mask of scores [batch, kv heads, groups · tokens, past + tokens]: 0 or `_MASKED`."""
        key = groups, window, str(dtype)
        if key not in self.cache:
            total = nodes.size(self.mask, 1)
            at = _count(nodes, total)
            own = nodes("Unsqueeze", nodes("Add", _count(nodes, tokens), nodes("Sub", total, tokens)), [1])
            seen = nodes("Cast", nodes("LessOrEqual", at, own, dtype=bool), dtype=dtype, to=onnx_type(dtype))
            real = nodes(
                "Cast", nodes("Unsqueeze", self.mask, [1, 2], dtype=self.mask.dtype), dtype=dtype, to=onnx_type(dtype)
            )
            kept = nodes("Mul", real, seen)
            if window > 0:
                kept = nodes("Mul", kept, self._near(nodes, tokens, total, window, dtype))
            less = nodes("Mul", nodes("Sub", np.array(1, dtype), kept, dtype=dtype), np.array(_MASKED, dtype))
            self.cache[key] = less if groups == 1 else nodes("Concat", *[less] * groups, axis=2)
        return self.cache[key]

    def _near(self, nodes: Nodes, tokens: gs.Tensor, total: gs.Tensor, window: int, dtype: np.dtype) -> gs.Tensor:
        """1 for keys among the last `window` real tokens up to the query, else 0, [batch, 1, tokens, total]."""
        place = nodes("CumSum", nodes("Cast", self.mask, dtype=np.int32, to=onnx_type(np.int32)), np.array(1, np.int64))
        start = nodes("Sub", total, tokens)
        query = nodes("Slice", place, start, total, [1])
        far = nodes("Sub", nodes("Unsqueeze", query, [1, 3]), nodes("Unsqueeze", place, [1, 2]))
        near = nodes("LessOrEqual", far, np.array(window - 1, np.int32), dtype=bool)
        return nodes("Cast", near, dtype=dtype, to=onnx_type(dtype))


def group_query_attention(nodes: Nodes, node: gs.Node, masks: Masks, head_dim: int) -> list[gs.Tensor]:
    """(output [batch, tokens, heads · head_dim], present key, present value) of the op.

    Source: com.microsoft GroupQueryAttention in ONNX Runtime's ContribOperators.md.
    """
    _check(node)
    heads, kv_heads = int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    query, key, value, past_key, past_value = node.inputs[:5]
    dtype = type_of(query)
    tokens = nodes.size(query if masks.ids is None else masks.ids, 1)
    if not key.name:
        query, key, value = _unpacked(nodes, query, head_dim, (heads, kv_heads, kv_heads))
    q, k, v = (
        nodes("Transpose", nodes("Reshape", t, [0, 0, n, head_dim], dtype=dtype), perm=[0, 2, 1, 3])
        for t, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if int(node.attrs.get("do_rotary", 0)):
        positions = _positions(nodes, node.inputs[5], tokens)
        tables = [nodes("Unsqueeze", nodes("Gather", t, positions, axis=0), [1]) for t in node.inputs[7:9]]
        interleaved = bool(node.attrs.get("rotary_interleaved", 0))
        rotated = 2 * int(node.inputs[7].shape[-1])
        q, k = (rotate(nodes, t, tables[0], tables[1], interleaved, head_dim, rotated) for t in (q, k))
    present = [nodes("Concat", past, new, axis=2, dtype=dtype) for past, new in ((past_key, k), (past_value, v))]
    scale = float(node.attrs.get("scale", 0.0)) or head_dim**-0.5
    groups = heads // kv_heads
    rows = (
        nodes("Reshape", nodes("Mul", q, np.array(scale, dtype)), [0, kv_heads, -1, head_dim])
        if groups > 1
        else (nodes("Mul", q, np.array(scale, dtype)))
    )  # heads that share keys are stacked as rows
    scores = nodes("MatMul", rows, nodes("Transpose", present[0], perm=[0, 1, 3, 2]))
    cap = float(node.attrs.get("softcap", 0.0))
    if cap:
        scores = nodes("Mul", nodes("Tanh", nodes("Mul", scores, np.array(1 / cap, dtype))), np.array(cap, dtype))
    window = int(node.attrs.get("local_window_size", -1))
    chances = nodes("Softmax", nodes("Add", scores, masks(nodes, tokens, groups, window, dtype)), axis=-1)
    context = nodes("MatMul", chances, present[1])
    if groups > 1:
        context = nodes("Reshape", context, [0, heads, -1, head_dim])
    flat = nodes("Reshape", nodes("Transpose", context, perm=[0, 2, 1, 3]), [0, 0, heads * head_dim])
    return [flat, *present]


def rotate(
    nodes: Nodes, x: gs.Tensor, cos: gs.Tensor, sin: gs.Tensor, interleaved: bool, width: int, rotated: int
) -> gs.Tensor:
    """x [batch, heads, tokens, width], its first `rotated` turned by cos and sin [batch, 1, tokens, rotated / 2]."""
    turned, rest = x, None
    if rotated < width:
        turned, rest = _parts(nodes, x, [rotated, width - rotated])
    if interleaved:
        pairs = nodes("Reshape", turned, [0, 0, 0, rotated // 2, 2])
        a, b = (nodes("Gather", pairs, np.array(i, np.int64), axis=4) for i in (0, 1))
    else:
        a, b = _parts(nodes, turned, [rotated // 2, rotated // 2])
    one = nodes("Sub", nodes("Mul", a, cos), nodes("Mul", b, sin))
    other = nodes("Add", nodes("Mul", b, cos), nodes("Mul", a, sin))
    if interleaved:
        both = nodes("Concat", nodes("Unsqueeze", one, [4]), nodes("Unsqueeze", other, [4]), axis=4)
        turned = nodes("Reshape", both, [0, 0, 0, rotated])
    else:
        turned = nodes("Concat", one, other, axis=3)
    return turned if rest is None else nodes("Concat", turned, rest, axis=3)


def rotary_embedding(nodes: Nodes, node: gs.Node) -> list[gs.Tensor]:
    """The output of com.microsoft RotaryEmbedding for x [batch, heads, tokens, width], or [batch, tokens, hidden]."""
    x, positions, cos, sin = node.inputs[:4]
    scale, heads = float(node.attrs.get("scale", 1.0)), int(node.attrs.get("num_heads", 0))
    half = int(cos.shape[-1])
    flat = x.shape is None or len(x.shape) == 3
    partial = int(node.attrs.get("rotary_embedding_dim", 0)) and heads
    width = int(x.shape[-1]) // heads if partial else 2 * half
    if scale != 1.0 or positions.shape is None or len(positions.shape) != 2:
        raise ModelError(f"{node.name}: RotaryEmbedding with a scale, or positions that are not [batch, tokens]")
    y = nodes("Transpose", nodes("Reshape", x, [0, 0, -1, width]), perm=[0, 2, 1, 3]) if flat else x
    tables = [nodes("Unsqueeze", nodes("Gather", t, positions, axis=0), [1]) for t in (cos, sin)]
    y = rotate(nodes, y, tables[0], tables[1], bool(node.attrs.get("interleaved", 0)), width, 2 * half)
    if not flat:
        return [y]
    back = nodes("Transpose", y, perm=[0, 2, 1, 3])
    return [nodes("Reshape", back, nodes("Shape", x))]


def _check(node: gs.Node) -> None:
    extra = [t.name for t in node.inputs[9:] if t.name]
    odd = [key for key, allowed in _PLAIN.items() if int(node.attrs.get(key, allowed[0])) not in allowed]
    unknown = [key for key in node.attrs if key not in _OPTIONS]
    if extra or odd or unknown or not all(t.name for t in node.inputs[3:6]):
        what = ", ".join([*extra, *odd, *unknown]) or "no past"
        raise ModelError(f"{node.name}: GroupQueryAttention with {what} cannot be lowered to standard ops")


def _positions(nodes: Nodes, last: gs.Tensor, tokens: gs.Tensor) -> gs.Tensor:
    """Positions of the new tokens, [batch, tokens]; `last` [batch] is the position of each row's last token."""
    wide = nodes("Cast", last, dtype=np.int64, to=onnx_type(np.int64))
    start = nodes("Max", nodes("Sub", nodes("Add", wide, [1]), tokens), [0])
    return nodes("Add", nodes("Unsqueeze", nodes("Reshape", start, [-1]), [1]), _count(nodes, tokens))


def _count(nodes: Nodes, size: gs.Tensor) -> gs.Tensor:
    """0, 1, ..., `size` - 1."""
    end = nodes("Reshape", size, np.zeros(0, np.int64), dtype=np.int64)
    return nodes("Range", np.array(0, np.int64), end, np.array(1, np.int64), dtype=np.int64)


def _unpacked(nodes: Nodes, packed: gs.Tensor, head_dim: int, heads: tuple[int, ...]) -> list[gs.Variable]:
    return _parts(nodes, packed, [n * head_dim for n in heads], axis=2)


def _parts(nodes: Nodes, x: gs.Tensor, sizes: list[int], axis: int = 3) -> list[gs.Variable]:
    name = nodes.next("Split")
    outputs = [gs.Variable(f"{name}.{i}", type_of(x)) for i in range(len(sizes))]
    split = gs.Node("Split", name, attrs={"axis": axis}, inputs=[x, nodes.tensor(sizes)], outputs=outputs)
    nodes.graph.nodes.append(split)
    return outputs
