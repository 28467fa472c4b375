"""A llama2.c checkpoint → a Hugging Face directory: python llama2c.py stories260K.bin tok512.bin OUT

The format is that of Karpathy's llama2.c: seven int32 (width, FFN width, layers, heads, key-value heads, vocabulary,
positions), then all weights as float32. Its rotary embedding turns neighbouring pairs, transformers' turns halves, so
rows of the query and key projections change places. The tokenizer is a .bin of llama2.c (score, length and bytes of
each token) or a .vocab of SentencePiece (one token per line).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

_SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2; llama2.c wraps the last two in newlines


def read_weights(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes and weights, these under transformers' names."""
    raw = path.read_bytes()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    *sizes, vocabulary, positions = struct.unpack("7i", raw[:28])
    config = dict(zip(names, sizes, strict=True))
    d, hidden, layers, heads, kv_heads = sizes
    config |= {"vocab_size": abs(vocabulary), "max_position_embeddings": positions}
    kv = d // heads * kv_heads
    flat, at = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return flat[at - size : at].reshape(shape)

    weights = {"model.embed_tokens.weight": take(abs(vocabulary), d)}
    parts = [
        ("input_layernorm", (d,)), ("self_attn.q_proj", (d, d)), ("self_attn.k_proj", (kv, d)),
        ("self_attn.v_proj", (kv, d)), ("self_attn.o_proj", (d, d)), ("post_attention_layernorm", (d,)),
        ("mlp.gate_proj", (hidden, d)), ("mlp.down_proj", (d, hidden)), ("mlp.up_proj", (hidden, d)),
    ]  # fmt: skip
    for name, shape in parts:
        stacked = take(layers, *shape)
        for layer, weight in enumerate(stacked):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = _halves(weight, heads if name == "self_attn.q_proj" else kv_heads)
            weights[f"model.layers.{layer}.{name}.weight"] = weight
    weights["model.norm.weight"] = take(d)
    return config, weights


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in the order of a rotary embedding that turns halves, not neighbours."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_tokens(path: Path) -> list[tuple[str, float]]:
    """(text, score) of each token, with blanks as "▁" and single bytes as "<0x41>", as LLaMA's tokenizers have them."""
    if path.suffix == ".vocab":
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = (line.rsplit("\t", 1) for line in lines)
        return [(text, float(score)) for text, score in pairs]
    raw, at, found = path.read_bytes(), 4, []
    while at < len(raw):
        score, size = struct.unpack_from("fi", raw, at)
        text = raw[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁")
        found.append((_SPECIAL[len(found)] if len(found) < len(_SPECIAL) else text, score))
        at += 8 + size
    return found


def make_tokenizer(tokens: list[tuple[str, float]]) -> Any:
    """Byte-pair encoding: two neighbours merge where their join is a token, that of the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: number for number, (text, _) in enumerate(tokens)}
    ranked = sorted(
        (-score, text)
        for text, score in tokens[len(_SPECIAL) :]
        if len(text) > 1 and not (text.startswith("<0x") and len(text) == 6)
    )
    merges = [
        (text[:cut], text[cut:])
        for _, text in ranked
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    inner = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback="<0x00>" in vocabulary)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main(
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    tokenizer: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, weights = read_weights(checkpoint)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    model.save_pretrained(out)
    make_tokenizer(read_tokens(tokenizer)).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    typer.run(main)
