"""Small models of random weights, in the formats of the models that the examples use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import zoo
from seeds import seeded

SIZES = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
WORDS = [f"{consonant}{vowel}{end}er" for consonant in "bdfgklmnprst" for vowel in "aeiou" for end in "lnrst"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def sentences(count: int) -> list[str]:
    """Sentences of 5 to 12 words."""
    rng = seeded()
    return [" ".join(rng.choice(WORDS, int(rng.integers(5, 13)))) for _ in range(count)]


def encoder(folder: Path) -> Path:
    """A sentence-transformers folder: a BERT of six layers, mean pooling, unit length."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=len(WORDS) + len(SPECIAL), max_position_embeddings=160, **SIZES))
    _save(model, folder)
    library = "sentence_transformers.models"
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    _write(folder / "modules.json", [
        {"idx": i, "name": str(i), "path": path, "type": f"{library}.{kind}"} for i, (path, kind) in enumerate(modules)
    ])  # fmt: skip
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": SIZES["hidden_size"], "pooling_mode_mean_tokens": True}
    _write(folder / "1_Pooling" / "config.json", pooling)
    return folder


def decoder(folder: Path) -> Path:
    """A LLaMA of six layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | {"num_attention_heads": 3, "num_key_value_heads": 1}
    vocabulary = len(WORDS) + len(SPECIAL)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True, **sizes)
    _save(LlamaForCausalLM(config), folder)
    return folder


def vision(path: Path) -> Path:
    """A vision transformer as an ONNX file, whose output is called output_importance."""
    proto = onnx.load(zoo.exported("vit"))
    (last,) = proto.graph.output
    for node in proto.graph.node:
        node.output[:] = ["output_importance" if name == last.name else name for name in node.output]
    last.name = "output_importance"
    onnx.save(proto, path)
    return path


def _save(model: Any, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    generator = torch.Generator().manual_seed(int(seeded().integers(1 << 30)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
    model.eval().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, "[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
