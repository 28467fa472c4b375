"""A LLaMA of random weights for llama.cpp: write_gguf.py OUT.gguf Q8_0|Q4_0 CONFIG.json

Runs in an interpreter that has the package `gguf`. Every matrix is in the one format, as `llama-quantize --pure` makes
them (without it, Q4_0 has a head of Q6_K, which takes longer). Matrices of one shape have the same values, each in a
place of its own.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize


def main(out: str, form: str, config: str) -> None:
    sizes = json.loads(Path(config).read_text())
    width, neurons, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    heads, shared, tokens = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["vocab_size"]
    kind = GGMLQuantizationType[form]

    writer = GGUFWriter(out, "llama")
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(tokens)
    writer.add_tokenizer_model("no_vocab")

    @cache
    def matrix(rows: int, columns: int) -> np.ndarray:
        drawn = np.random.default_rng(0).standard_normal((rows, columns), np.float32) * np.float32(0.02)
        return quantize(drawn, kind)

    def add(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", matrix(rows, columns), raw_dtype=kind)

    ones = np.ones(width, np.float32)
    add("token_embd", tokens, width)
    for layer in range(layers):
        at, kv = f"blk.{layer}", width // heads * shared
        writer.add_tensor(f"{at}.attn_norm.weight", ones)
        writer.add_tensor(f"{at}.ffn_norm.weight", ones)
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", kv, width), ("attn_v", kv, width), ("attn_output", width, width),
            ("ffn_gate", neurons, width), ("ffn_up", neurons, width), ("ffn_down", width, neurons),
        ):  # fmt: skip
            add(f"{at}.{name}", rows, columns)
    writer.add_tensor("output_norm.weight", ones)
    add("output", tokens, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf.GGUFReader(out).tensors


if __name__ == "__main__":
    main(*sys.argv[1:])
