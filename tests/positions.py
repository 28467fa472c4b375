"""Tiny random models in which positions reach attention by arithmetic, long enough to leave every bucket."""

from __future__ import annotations

import copy
import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import zoo
from filelock import FileLock
from rewrite import canonical

LENGTH = 512
_SIZES = {"vocab_size": 149, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_DEBERTA = {
    "relative_attention": True, "position_buckets": 32, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
    "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mpnet": ("MPNetModel", {**_SIZES, "intermediate_size": 88, "max_position_embeddings": LENGTH + 2}),
    "deberta_v2": ("DebertaV2Model", {
        **_SIZES, **_DEBERTA, "intermediate_size": 88, "max_position_embeddings": LENGTH,
    }),
    "bloom": ("BloomForCausalLM", {
        "vocab_size": 149, "hidden_size": 48, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }),
}  # fmt: skip

FAMILIES = ("t5", "llama", *_CONFIGS)
"""Logarithmic buckets, rotary angles, buckets as T5's, disentangled attention, ALiBi."""
TABLES = ("relative_attention_bias", "rel_embeddings")


@cache
def positional_model(family: str) -> Any:
    """A transformers model in eval mode. Tables of relative positions are as large as trained ones are."""
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(1 + FAMILIES.index(family))
        if family in _CONFIGS:
            name, sizes = _CONFIGS[family]
            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**sizes)).eval()
        else:
            model = copy.deepcopy(zoo.tiny_model(family))
        for name, parameter in model.named_parameters():
            if any(table in name for table in TABLES):
                torch.nn.init.normal_(parameter, std=2.0)
            elif family in _CONFIGS:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def positional_graph(family: str) -> gs.Graph:
    """`positional_model(family)` as trimtab exports it."""
    graph = canonical(_exported(family) if family in _CONFIGS else zoo.exported(family))
    trained = dict(positional_model(family).named_parameters())
    for name, tensor in graph.tensors().items():  # the zoo's own are small
        if isinstance(tensor, gs.Constant) and any(table in name for table in TABLES):
            tensor.values = trained[name.removeprefix("model.")].detach().numpy()
    return graph


def _exported(family: str) -> Path:
    from trimtab.compiler.sources.transformer import Exportable

    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    path = zoo._root() / f"{family}-{digest}" / "model.onnx"
    with FileLock(f"{path.parent}.lock"):
        if not path.is_file():
            part = path.parent.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            Exportable(positional_model(family)).export(part / "model.onnx")
            part.rename(path.parent)
    return path


def long_feeds(names: list[str], batch: int, tokens: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random inputs; all rows but the first end in padding."""
    lengths = np.concatenate([[tokens], rng.integers(1, tokens + 1, batch - 1)])
    made = {
        "input_ids": rng.integers(3, 131, (batch, tokens)),
        "attention_mask": (np.arange(tokens) < lengths[:, None]).astype(np.int64),
    }
    return {name: made[name] for name in names}
