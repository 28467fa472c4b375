"""`python -m trimtab.compiler.sources.architecture FOLDER OUT`: the class of a model whose config.json names none.

The model's type has a class for each task. Each is made without weights, and the names of its weights are compared
with those in the folder: the class is the one whose names are all there, and no others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers.models.auto import modeling_auto as auto

from trimtab.compiler.sources.child import report
from trimtab.passes.errors import ModelError

_ANSWER = "architecture.json"
_HEADS = (
    "FOR_SEQUENCE_CLASSIFICATION_", "FOR_TOKEN_CLASSIFICATION_", "FOR_QUESTION_ANSWERING_", "FOR_MASKED_LM_",
    "FOR_CAUSAL_LM_", "FOR_IMAGE_CLASSIFICATION_", "",
)  # fmt: skip
"""Parts of the names of transformers' tables, model type → class, for the tasks that are exported."""
_BUFFERS = ("position_ids", "inv_freq", "attn.bias", "attn.masked_bias", "token_type_ids")
"""Ends of names that older versions of transformers saved, and that are no weights."""


def find_architecture(folder: Path) -> str:
    """The class of the model in `folder`.

    Raises:
        ModelError: transformers does not know its type, or not exactly one class has the names of its weights.
    """
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "config.json names no architecture, and a model_type that transformers does not know"
        ) from error
    names = set(_weight_names(sorted(folder.glob("*.safetensors"))))
    classes = list(_classes(config))
    # Names that transformers changes as it reads a file are known to it alone, but then it reads all weights.
    fitting = [kind for kind in classes if _fits(kind, config, names)] or [
        kind for kind in classes if _loads(kind, folder)
    ]
    if len(fitting) != 1:
        which = " and ".join(kind.__name__ for kind in fitting) or "none"
        raise ModelError(
            f"config.json names no architecture, and of the classes of a {config.model_type} {which} "
            f"{'fit' if fitting else 'fits'} its weights",
            hint='add the class of the model to config.json, such as "architectures": ["BertModel"]',
        )
    return str(fitting[0].__name__)


def _classes(config: Any) -> Iterator[Any]:
    tables = {head: getattr(auto, f"MODEL_{head}MAPPING_NAMES") for head in _HEADS}
    if config.model_type in tables["FOR_MASKED_LM_"]:  # both have the same weights
        del tables["FOR_MASKED_LM_" if getattr(config, "is_decoder", False) else "FOR_CAUSAL_LM_"]
    for table in tables.values():
        name = table.get(config.model_type)
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if kind is not None:
            yield kind


def _fits(kind: Any, config: Any, names: set[str]) -> bool:
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception:  # any: a class may want more of the config than there is
        return False
    wanted = set(model.state_dict())
    tied = {name for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items() for name in pair}
    return _same(kind, wanted - names - tied, names - wanted)


def _loads(kind: Any, folder: Path) -> bool:
    options = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    try:
        _, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception:  # any, as above
        return False
    return _same(kind, info["missing_keys"], info["unexpected_keys"])


def _same(kind: Any, missing: Iterable[str], unexpected: Iterable[str]) -> bool:
    """Whether nothing that counts is missing, nor there for another class. Token states need no pooler."""
    without_head = kind.__name__.endswith("Model")
    lacks = any(not (without_head and "pooler." in name) for name in missing)
    return not lacks and all(name.endswith(_BUFFERS) for name in unexpected)


def _weight_names(files: Iterable[Path]) -> Iterator[str]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            yield from opened.keys()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    return report(
        options.out, lambda: (options.out / _ANSWER).write_text(json.dumps(find_architecture(options.folder))) and None
    )


if __name__ == "__main__":
    raise SystemExit(main())
