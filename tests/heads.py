"""Tiny classifiers, rerankers and regressions of several families, with a tokenizer that joins pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS, TEXT = 90, 48
_SIZES = {
    "vocab_size": WORDS + 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 72, "max_position_embeddings": TEXT + 2,
}  # fmt: skip
_TYPED = ("bert", "electra")
"""Families with types of tokens, by which a model tells the second text of a pair."""

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra", "distilbert": "DistilBert", "mpnet": "MPNet"}


def head_model(family: str, seed: int, kind: str = "SequenceClassification", **config: Any) -> Any:
    """A transformers model for `kind` in eval mode; `config` has `num_labels` and the like."""
    import torch
    import transformers

    sizes = dict(_SIZES)
    if family == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        sizes = {names.get(name, name): size for name, size in sizes.items()} | {"hidden_dim": 72}
        del sizes["intermediate_size"]
    if family == "electra":
        sizes["embedding_size"] = 24
    model_class = getattr(transformers, f"{_CLASSES[family]}For{kind}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = model_class(model_class.config_class(**sizes | special | config)).eval()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = (
                noise * 0.1 + ("bias" not in name) if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
            )
        return model


def save_onnx(model: Any, folder: Path, outputs: Sequence[str] = ("logits",), **more: Any) -> Path:
    """`model` as an ONNX file of torch's older exporter, which is quick; config.json (with `more`) beside it."""
    import warnings

    import torch

    folder.mkdir(parents=True, exist_ok=True)
    pair_tokenizer().save_pretrained(folder)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]} | more
    (folder / "config.json").write_text(json.dumps(config, default=str))
    model.set_attn_implementation("eager")
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (model.config.model_type in _TYPED)

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            made = self.model(**dict(zip(names, tensors, strict=True)))
            return tuple(made[name] for name in outputs)

    by_sample = type(model).__name__.endswith("SequenceClassification")
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    axes |= {name: {0: "batch"} if by_sample else {0: "batch", 1: "tokens"} for name in outputs}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Outputs().eval(), tuple(torch.ones(2, 7, dtype=torch.int64) for _ in names), str(folder / "model.onnx"),
            input_names=names, output_names=list(outputs), dynamic_axes=axes, opset_version=17, dynamo=False,
        )  # fmt: skip
    return folder / "model.onnx"


def pair_tokenizer() -> Any:
    """Words w0, w1, ...; the second text of a pair has the token type 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] + [f"w{i}" for i in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=TEXT, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def texts(rng: np.random.Generator, count: int, longest: int = 14) -> list[str]:
    """Texts of 1 to `longest` words."""
    return [" ".join(f"w{i}" for i in rng.integers(0, WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Pairs of very different lengths: some first texts are longer than the model takes, and some second ones."""
    short, long = texts(rng, count, 4), texts(rng, count, TEXT + 20)
    return [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(zip(short, long, strict=True))]


def feeds(rng: np.random.Generator, batch: int, tokens: int, family: str = "bert") -> dict[str, np.ndarray]:
    """Random ids; rows end in padding of random length."""
    lengths = rng.integers(1, tokens + 1, batch)
    made = {
        "input_ids": rng.integers(3, WORDS, (batch, tokens)),
        "attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64),
    }
    if family in _TYPED:
        made["token_type_ids"] = rng.integers(0, 2, (batch, tokens))
    return made


def torch_logits(model: Any, given: list[Any]) -> np.ndarray:
    """Logits of texts or pairs by transformers itself."""
    import torch

    tokenizer = pair_tokenizer()
    parts = [list(part) for part in zip(*given, strict=True)] if isinstance(given[0], tuple) else [given]
    feeds = tokenizer(*parts, padding=True, truncation=True, max_length=TEXT, return_tensors="pt")
    if model.config.model_type not in _TYPED:
        feeds.pop("token_type_ids")
    with torch.no_grad():
        logits: np.ndarray = model(**feeds).logits.numpy()
    return logits


def ask_front(repository: Path, name: str, **inputs: list[str]) -> dict[str, np.ndarray]:
    """Load the text model of a packaged repository without a server, and ask it once.

    The module that Triton gives, `triton_python_backend_utils`, must be a stub in sys.modules (`stub_backend`).
    """
    from types import SimpleNamespace

    from trimtab.compiler.packaging.triton.served.front import TritonPythonModel

    model = TritonPythonModel()
    model.initialize(
        {"model_repository": str(repository / name), "model_version": "1", "model_instance_device_id": "0"}
    )
    given = {key: np.array([[text.encode()] for text in value], object) for key, value in inputs.items()}
    (response,) = model.execute([SimpleNamespace(given=given)])
    if isinstance(response, Exception):
        raise response
    return dict(response)


def stub_backend(modules: dict[str, Any]) -> None:
    """Put a stand-in for Triton's module into `modules` (sys.modules)."""
    from types import ModuleType, SimpleNamespace

    backend: Any = ModuleType("triton_python_backend_utils")
    backend.get_input_tensor_by_name = lambda request, name: (
        SimpleNamespace(as_numpy=lambda: request.given[name]) if name in request.given else None
    )
    backend.Tensor = lambda name, value: (name, value)
    backend.TritonError = lambda text, *code: RuntimeError(text)
    backend.InferenceResponse = lambda tensors=None, error=None: error if error is not None else tensors
    modules[backend.__name__] = backend
