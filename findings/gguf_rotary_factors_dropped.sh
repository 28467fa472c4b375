#!/bin/bash
# transformers 5.23.0 reads a GGUF file of a LLaMA and leaves out how its positions are scaled, without a word.
#
# Versions: transformers 5.23.0, gguf 0.19.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6; Python 3.11 or later.
#
# Llama 3.1 and its successors divide the frequencies of the rotation. llama.cpp's converter stores the divisors as the
# tensor rope_freqs.weight; other models have the keys llama.rope.scaling.type and .factor. from_pretrained(gguf_file=...)
# uses neither: the config says rope_type "default", the loading info names no unexpected key, nothing is logged, and the
# logits are those of the file without them. Short prompts hide it; the further apart tokens are, the more is wrong.
# What to do: give the original checkpoint, or set rope_parameters of the config by hand.
#
# Seen:
#   as it is                          rope_type default
#   rope_freqs.weight of 1 to 8       rope_type default, unexpected keys none, logits equal to the first: True
#   rope.scaling.type linear, by 4    rope_type default, unexpected keys none, logits equal to the first: True
#   config with linear scaling by 4   rope_type linear, logits equal to the first: False
#
# Exits with 0 as long as this is what happens, with 1 when it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cat > "$folder/show.py" <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import torch
import transformers
from gguf import GGUFWriter, RopeScalingType

transformers.utils.logging.set_verbosity_warning()
transformers.utils.logging.disable_progress_bar()
WIDTH, NEURONS, HEADS, TOKENS = 64, 96, 4, 100


def write(name, change):
    rng, writer = np.random.default_rng(0), GGUFWriter(name, "llama")
    for add, value in (
        (writer.add_context_length, 128), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, NEURONS), (writer.add_head_count, HEADS), (writer.add_head_count_kv, HEADS),
        (writer.add_rope_dimension_count, WIDTH // HEADS), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, TOKENS),
    ):
        add(value)
    for tensor, *shape in (
        ("token_embd", TOKENS, WIDTH), ("output_norm", WIDTH), ("blk.0.attn_norm", WIDTH), ("blk.0.ffn_norm", WIDTH),
        ("blk.0.attn_q", WIDTH, WIDTH), ("blk.0.attn_k", WIDTH, WIDTH), ("blk.0.attn_v", WIDTH, WIDTH),
        ("blk.0.attn_output", WIDTH, WIDTH), ("blk.0.ffn_gate", NEURONS, WIDTH), ("blk.0.ffn_up", NEURONS, WIDTH),
        ("blk.0.ffn_down", WIDTH, NEURONS),
    ):
        values = rng.standard_normal(shape) * shape[-1] ** -0.5 if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{tensor}.weight", values.astype(np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def linear(writer):
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


CASES = [
    ("as it is", lambda writer: None),
    ("rope_freqs.weight of 1 to 8", lambda writer: writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))),
    ("rope.scaling.type linear, by 4", linear),
]
print(", ".join(f"{name} {version(name)}" for name in ("transformers", "gguf", "torch")))
ids, first, same = torch.arange(TOKENS)[None], None, True
for label, change in CASES:
    write("model.gguf", change)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        ".", gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
    )
    logits, kind = model(ids).logits.detach(), model.config.rope_parameters["rope_type"]
    first = logits if first is None else first
    unexpected, equal = info["unexpected_keys"], torch.equal(logits, first)
    print(f"{label}: rope_type {kind}, unexpected keys {unexpected or 'none'}, logits equal to the first: {equal}")
    same &= kind == "default" and not unexpected and equal
config = transformers.LlamaConfig(**model.config.to_dict() | {"quantization_config": None})
config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
scaled = transformers.LlamaForCausalLM(config).eval()
scaled.load_state_dict(model.state_dict())
equal = torch.equal(scaled(ids).logits, first)
print(f"config with linear scaling by 4: rope_type linear, logits equal to the first: {equal}")
same &= not equal
print("as described above" if same else "CHANGED")
sys.exit(not same)
PYTHON
cd "$folder"
venv/bin/python show.py
