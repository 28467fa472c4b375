"""Tiny random models of every family, and their ONNX files from every exporter.

Sizes differ from each other wherever a mix-up should show: d_model, d_ff, vocabulary, labels, heads.
Exported files are kept in the user's cache, keyed by the code that makes them, so that each is made once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

TEXT = 64
"""Most tokens that any of the models takes."""


def _model(architecture: str, **sizes: int) -> tuple[str, dict[str, int]]:
    return architecture, sizes


_CONFIGS: dict[str, tuple[str, dict[str, int]]] = {
    "bert": _model(
        "BertForSequenceClassification",
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=80,
        max_position_embeddings=TEXT,
        num_labels=3,
    ),
    "roberta": _model(
        "RobertaForSequenceClassification",
        vocab_size=103,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=5,
        intermediate_size=72,
        max_position_embeddings=TEXT + 2,
        num_labels=5,
        type_vocab_size=1,
    ),
    "distilbert": _model(
        "DistilBertModel",
        vocab_size=107,
        dim=48,
        n_layers=3,
        n_heads=3,
        hidden_dim=88,
        max_position_embeddings=TEXT,
    ),
    "vit": _model(
        "ViTForImageClassification",
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=68,
        image_size=24,
        patch_size=8,
        num_labels=7,
    ),
    "gpt2": _model(
        "GPT2LMHeadModel",
        vocab_size=109,
        n_embd=40,
        n_layer=2,
        n_head=5,
        n_inner=104,
        n_positions=TEXT,
    ),
    "opt": _model(
        "OPTForCausalLM",
        vocab_size=113,
        hidden_size=48,
        num_hidden_layers=3,
        ffn_dim=92,
        num_attention_heads=3,
        max_position_embeddings=TEXT,
        word_embed_proj_dim=48,
    ),
    "gpt_neox": _model(
        "GPTNeoXForCausalLM",
        vocab_size=127,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=116,
        max_position_embeddings=TEXT,
    ),
    "llama": _model(
        "LlamaForCausalLM",
        vocab_size=131,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=108,
        max_position_embeddings=TEXT,
    ),
    "qwen2": _model(
        "Qwen2ForCausalLM",
        vocab_size=137,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=124,
        max_position_embeddings=TEXT,
    ),
    "gemma": _model(
        "GemmaForCausalLM",
        vocab_size=139,
        hidden_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=136,
        max_position_embeddings=TEXT,
    ),
    "t5": _model(
        "T5EncoderModel",
        vocab_size=149,
        d_model=40,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
    ),
}

FAMILIES = tuple(_CONFIGS)
DECODERS = ("gpt2", "opt", "gpt_neox", "llama", "qwen2", "gemma")
EXPORTERS = ("dynamo", "torchscript", "cached", "genai")


@cache
def tiny_model(family: str) -> Any:
    """A transformers model of `family` in eval mode, with random weights that are the same in every process."""
    import torch
    import transformers

    name, sizes = _CONFIGS[family]
    model_class = getattr(transformers, name)
    if "vocab_size" in sizes:
        sizes = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | sizes
    config = model_class.config_class(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = model_class(config).eval()
        for parameter in model.parameters():  # biases and norms too: as constants 0 and 1 they would hide mistakes
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def save_pretrained(family: str, folder: Path) -> Path:
    """`tiny_model(family)` as a Hugging Face directory with a word-level tokenizer."""
    model = tiny_model(family)
    model.save_pretrained(folder)
    if "vocab_size" in _CONFIGS[family][1]:
        _tokenizer(model.config.vocab_size).save_pretrained(folder)
    return folder


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] + [f"w{i}" for i in range(4, size)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]", model_max_length=TEXT,
    )  # fmt: skip


def feeds(family: str, batch: int, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs of the exported model; rows end in padding of random length."""
    if family == "vit":
        return {"pixel_values": rng.standard_normal((batch, 3, 24, 24), dtype=np.float32)}
    vocabulary = _CONFIGS[family][1]["vocab_size"]
    lengths = rng.integers(1, tokens + 1, batch)
    found = {
        "input_ids": rng.integers(3, vocabulary, (batch, tokens)),
        "attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64),
    }
    if family == "bert":
        found["token_type_ids"] = rng.integers(0, 2, (batch, tokens))
    return found


def exported(family: str, exporter: str = "dynamo") -> Path:
    """The ONNX file that `exporter` makes of `tiny_model(family)`; "cached" and "genai" know only decoders."""
    root = _root()
    path = root / f"{family}-{exporter}" / "model.onnx"
    with FileLock(str(root / f"{family}-{exporter}.lock")):
        if not path.is_file():
            part = path.parent.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            _EXPORT[exporter](family, part)
            part.rename(path.parent)
    return path


@cache
def _root() -> Path:
    import trimtab.compiler.sources.decoder as decoder
    import trimtab.compiler.sources.pooling as pooling
    import trimtab.compiler.sources.torch_export as torch_export
    import trimtab.compiler.sources.transformer as transformer

    digest = hashlib.sha256()
    for module in (torch_export, transformer, decoder, pooling):
        digest.update(inspect.getsource(module).encode())
    digest.update(Path(__file__).read_bytes())
    for package in ("torch", "transformers", "onnxscript", "onnxruntime-genai"):
        digest.update(importlib.metadata.version(package).encode())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = home / "trimtab-tests" / digest.hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    return root


def _dynamo(family: str, folder: Path) -> None:
    from trimtab.compiler.sources.transformer import Exportable

    Exportable(tiny_model(family)).export(folder / "model.onnx")


def _cached(family: str, folder: Path) -> None:
    from trimtab.compiler.sources.decoder import Decoder

    Decoder(tiny_model(family)).export(folder / "model.onnx")


def _torchscript(family: str, folder: Path) -> None:
    """torch's older exporter, at the opset that most of its files in the wild have."""
    import warnings

    import torch

    from trimtab.compiler.sources.transformer import Exportable

    module = Exportable(tiny_model(family)).eval()
    axes = {0: "batch"} if family == "vit" else {0: "batch", 1: "tokens"}
    out = axes if "LM" in type(module.model).__name__ or module.outputs != ("logits",) else {0: "batch"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, module.examples(), folder / "model.onnx", dynamo=False, opset_version=17,
            input_names=module.inputs, output_names=module.outputs,
            dynamic_axes=dict.fromkeys(module.inputs, axes) | dict.fromkeys(module.outputs, out),
        )  # fmt: skip


def _genai(family: str, folder: Path) -> None:
    """ONNX Runtime GenAI's model builder: com.microsoft ops, key-value cache as inputs and outputs."""
    source = save_pretrained(family, folder / "source")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder, "-p", "fp32"]
    run = subprocess.run([*command, "-e", "cpu", "-c", folder / "cache"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


_EXPORT = {"dynamo": _dynamo, "torchscript": _torchscript, "cached": _cached, "genai": _genai}
