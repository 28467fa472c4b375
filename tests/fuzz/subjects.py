"""What is damaged: small sound inputs of every kind that trimtab reads from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

VOCAB, WIDTH, NEURONS, CLASSES, HEADS = 40, 16, 32, 3, 2
SIZES: dict[str, Any] = {
    "workload": {"batch": [1, 2, 4], "tokens": [1, 4, 8]},
    "calibration": {"samples": 16, "states": 64},
}


class Builder:
    """Nodes and weights of a graph, made one after the other."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.nodes, self.weights = rng, list[NodeProto](), dict[str, np.ndarray]()

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = (self.rng.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)
        return name

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.array(value, dtype)
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind} {len(self.nodes)}", **attributes))
        return output

    def linear(self, x: str, rows: int, columns: int, *, gemm: bool = False) -> str:
        if gemm:
            return self.op("Gemm", x, self.weight(rows, columns), self.weight(columns))
        return self.op("Add", self.op("MatMul", x, self.weight(rows, columns)), self.weight(columns))


def attention(b: Builder, x: str) -> str:
    """Spelled-out attention of `HEADS` heads."""
    size = WIDTH // HEADS
    split = b.constant([0, 0, HEADS, size])

    def heads(perm: list[int]) -> str:
        return b.op("Transpose", b.op("Reshape", b.linear(x, WIDTH, WIDTH), split), perm=perm)

    q, k, v = heads([0, 2, 1, 3]), heads([0, 2, 3, 1]), heads([0, 2, 1, 3])
    scores = b.op("Mul", b.op("MatMul", q, k), b.constant(size**-0.5, np.float32))
    mixed = b.op("Transpose", b.op("MatMul", b.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    return b.linear(b.op("Reshape", mixed, b.constant([0, 0, WIDTH])), WIDTH, WIDTH)


def activation(b: Builder, kind: str, x: str) -> str:
    if kind == "gelu":
        scaled = b.op("Erf", b.op("Div", x, b.constant(2**0.5, np.float32)))
        return b.op("Mul", b.op("Mul", x, b.op("Add", scaled, b.constant(1, np.float32))), b.constant(0.5, np.float32))
    return b.op("Mul", x, b.op("Sigmoid", x)) if kind == "silu" else b.op("Relu", x)


def encoder(rng: np.random.Generator) -> ModelProto:
    """Tokens → layers of attention and FFN with LayerNorms → mean → logits; activation and layers by chance."""
    b = Builder(rng)
    kind, layers = str(rng.choice(["gelu", "silu", "relu"])), int(rng.integers(1, 3))
    x = b.op("Gather", b.weight(VOCAB, WIDTH), "input_ids")
    for _ in range(layers):
        x = b.op("LayerNormalization", b.op("Add", x, attention(b, x)), b.weight(WIDTH), b.weight(WIDTH), axis=-1)
        hidden = b.linear(x, WIDTH, NEURONS)
        if kind == "silu":
            hidden = b.op("Mul", activation(b, kind, hidden), b.linear(x, WIDTH, NEURONS))
        else:
            hidden = activation(b, kind, hidden)
        x = b.op("Add", x, b.linear(hidden, NEURONS, WIDTH))
    pooled = b.op("ReduceMean", x, b.constant([1]), keepdims=0)
    b.op("Identity", b.linear(pooled, WIDTH, CLASSES, gemm=True), output="logits")
    graph = helper.make_graph(
        b.nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in b.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def decoder(rng: np.random.Generator) -> ModelProto:
    """One layer of a causal decoder with a cache: input_ids, attention_mask and past → logits and present."""
    b = Builder(rng)
    size = WIDTH // HEADS
    x = b.op("Gather", b.weight(VOCAB, WIDTH), "input_ids")
    split = b.constant([0, 0, HEADS, size])
    q, k, v = (
        b.op("Transpose", b.op("Reshape", b.linear(x, WIDTH, WIDTH), split), perm=[0, 2, 1, 3]) for _ in range(3)
    )
    keys = b.op("Concat", "past_key_values.0.key", k, axis=2, output="present.0.key")
    mixed = b.op("Concat", "past_key_values.0.value", v, axis=2, output="present.0.value")
    scores = b.op("MatMul", q, b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    hidden = b.op("Sub", b.op("Cast", "attention_mask", to=1), b.constant(1, np.float32))
    wide = b.op("Unsqueeze", b.op("Mul", hidden, b.constant(1e4, np.float32)), b.constant([1, 2]))
    attended = b.op("MatMul", b.op("Softmax", b.op("Add", scores, wide), axis=-1), mixed)
    joined = b.op("Reshape", b.op("Transpose", attended, perm=[0, 2, 1, 3]), b.constant([0, 0, WIDTH]))
    x = b.op("Add", x, b.linear(joined, WIDTH, WIDTH))
    gate = activation(b, "silu", b.linear(x, WIDTH, NEURONS))
    x = b.op("Add", x, b.linear(b.op("Mul", gate, b.linear(x, WIDTH, NEURONS)), NEURONS, WIDTH))
    b.op("MatMul", x, b.weight(WIDTH, VOCAB), output="logits")
    parts = ("key", "value")
    graph = helper.make_graph(
        b.nodes,
        "decoder",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
            *(
                helper.make_tensor_value_info(f"past_key_values.0.{p}", 1, ["batch", HEADS, "past", size])
                for p in parts
            ),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", VOCAB]),
            *(helper.make_tensor_value_info(f"present.0.{p}", 1, ["batch", HEADS, "total", size]) for p in parts),
        ],
        [numpy_helper.from_array(value, name) for name, value in b.weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def save(model: ModelProto, path: Path, *, external: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=256)
    else:
        onnx.save(model, path)
    return path


def ids(rng: np.random.Generator, rows: int = 24, tokens: int = 6) -> np.ndarray:
    return rng.integers(2, VOCAB, (rows, tokens))


def tokenizer(folder: Path) -> None:
    """Words w0 (token 4) up to the vocabulary; [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCAB - 4))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.save(str(folder / "tokenizer.json"))


RECIPES: list[list[Any]] = [
    [],
    ["canonicalize"],
    [{"ffn-split": {"heavy": 0.25, "multiple": 8, "block": 16}}],
    [{"ffn-split": {"heavy": 0.5, "multiple": 4, "rest_form": "affine", "heavy_form": "int8", "block": 16}}],
    [{"ffn-split": {"budget": {"size": 0.5}, "multiple": 8, "block": 16}}],
    [{"ffn-topk": {"take": 0.5, "most": 1.0, "rank": 4, "max_error": None}}],
    [{"ffn-threshold": {"sparsity": 0.5, "most": 1.0, "max_error": None}}],
    [{"ffn-route": {"router": "fitted", "sparsity": 0.5, "group": 4, "most": 1.0, "max_error": None}}],
    ["dynamic-int8"],
    ["static-int8"],
    [{"weight-only": {"bits": 4, "block": 16}}],
    [{"weight-only": {"bits": 8, "block": 16}}],
    ["precision"],
]
"""Passes of the recipes under which damaged models, Profiles and data are compiled."""
