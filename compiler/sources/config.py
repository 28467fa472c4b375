"""A model's config.json as transformers reads it. For child processes: it imports transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from trimtab.passes.errors import ModelError


def load_config(folder: Path) -> Any:
    """Read config.json in `folder`.

    Raises:
        ModelError: transformers does not know the model type, or refuses a value.
    """
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any: configs check their fields by exceptions that have no base in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(":")[:200]
        raise ModelError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} does not take it ({reason})",
            hint="download or save the model again, or correct config.json",
        ) from error
