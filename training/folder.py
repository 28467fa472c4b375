"""The folder of a new model, written atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.passes.errors import BuildError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BESIDE = ("*.json", "*.txt", "*.model")
"""Files of a Hugging Face directory besides its weights, such as the tokenizer's."""


def check_new_folder(out: Path) -> None:
    """Refuse a path that exists, unless it is an empty folder.

    Raises:
        BuildError: the path exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out}: exists already", hint="choose another folder, or remove this one")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill. It is renamed to `out` if the body ends without an error.

    Raises:
        BuildError: the folder cannot be written.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.replace(out)
    except OSError as error:
        message = f"{out}: cannot write the model ({error.strerror or error})"
        raise BuildError(message, hint="choose another folder") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_model(
    model: PreTrainedModel, old: Path, record: dict[str, Any], name: str, folder: Path, *, without: Collection[str] = ()
) -> None:  # fmt: skip
    """Fill `folder` with `model`, as a Hugging Face directory.

    Args:
        old: the model's folder before training, whose tokenizer is copied.
        record: settings and metrics of the training, written as the JSON file `name`.
        without: names of files in `old` that do not belong to the new model.
    """
    model.save_pretrained(folder)
    for path in (each for pattern in _BESIDE for each in old.glob(pattern)):
        left = path.name in without or path.name.endswith(".index.json")
        if not left and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    (folder / name).write_text(json.dumps(record, indent=1), encoding="utf-8")
