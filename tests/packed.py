"""Tiny random models whose gate and up are packed into one product, as transformers has them."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zoo
from filelock import FileLock

LAYERS, WIDTH, NEURONS, VOCABULARY = 2, 48, 80, 101
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": NEURONS, "max_position_embeddings": zoo.TEXT, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "modernbert": (
        "ModernBertForSequenceClassification",
        {"cls_token_id": 1, "sep_token_id": 2, "num_labels": 3, "local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 2, "sliding_window": None}),
    "glm": ("GlmForCausalLM", {"num_key_value_heads": 2, "head_dim": 12}),
}
FAMILIES = tuple(_MODELS)
EXPORTS = [("modernbert", "dynamo"), ("modernbert", "torchscript"), ("phi3", "dynamo"), ("phi3", "torchscript"),
           ("glm", "dynamo")]  # fmt: skip  # torch's older exporter does not take GLM


@cache
def tiny_model(family: str) -> Any:
    """A transformers model in eval mode, with random weights that are the same in every process."""
    import torch
    import transformers

    name, sizes = _MODELS[family]
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(FAMILIES.index(family))
        model = model_class(model_class.config_class(**_SIZES | sizes)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def exported(family: str, exporter: str = "dynamo") -> Path:
    """The ONNX file that `exporter` makes of `tiny_model(family)`, kept as zoo keeps its own."""
    from trimtab.compiler.sources.transformer import Exportable

    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
    root = zoo._root()
    folder = root / f"packed-{key}-{family}-{exporter}"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            module = Exportable(tiny_model(family)).eval()
            if exporter == "dynamo":
                module.export(part / "model.onnx")
            else:
                _script(module, part / "model.onnx")
            part.rename(folder)
    return folder / "model.onnx"


def _script(module: Any, path: Path) -> None:
    import warnings

    import torch

    names = (module.inputs, module.outputs)
    axes = {name: {0: "batch", 1: "tokens"} for name in names[0]} | {name: {0: "batch"} for name in names[1]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, module.examples(), path, dynamo=False, opset_version=17, input_names=names[0],
            output_names=names[1], dynamic_axes=axes,
        )  # fmt: skip


def feeds(batch: int, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random ids, and a mask whose rows end in padding of random length."""
    lengths = rng.integers(1, tokens + 1, batch)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(3, VOCABULARY, (batch, tokens)), "attention_mask": mask}
