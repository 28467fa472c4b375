"""A model's config.json as transformers reads it. For child processes: it imports transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from trimtab.passes.errors import ModelError

MAX_PARTS = 1 << 14
"""Maximum number of layers or experts. Each takes memory and time before any weight is read; no model has as many."""


def load_config(folder: Path) -> Any:
    """Read config.json in `folder`.

    Raises:
        ModelError: transformers does not know the model type, or refuses a value; or there are more layers or experts
            than any model has.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any: configs check their fields by exceptions that have no base in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")[:200]
        raise ModelError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} does not take it ({reason})",
            hint="download or save the model again, or correct config.json",
        ) from error
    for key, count in _parts(config.to_dict()):
        if count > MAX_PARTS:
            raise ModelError(
                f"{folder / 'config.json'}: {key} is {count}, over the limit of {MAX_PARTS}",
                hint="correct config.json: no model has as many",
            )
    return config


def _parts(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of layers and experts in a config, those of configs inside it too."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _parts(value)
        elif isinstance(value, int) and re.search("layer|expert", str(key)):
            yield str(key), value
