"""Path → Source: detects the format of the model, or reports the formats that trimtab takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trimtab.compiler.sources.checkpoint import is_checkpoint, onnx_file, read_checkpoint
from trimtab.compiler.sources.folder import class_labels, model_head, optional_config, token_limit, tokenizer_folder
from trimtab.compiler.sources.gguf import is_gguf, unpacked
from trimtab.compiler.sources.huggingface import exported
from trimtab.compiler.sources.source import Source
from trimtab.compiler.sources.trial import try_out
from trimtab.compiler.task import UNKNOWN
from trimtab.passes.errors import ModelError
from trimtab.passes.os_errors import no_file

_ACCEPTED = (
    "give a Hugging Face directory (config.json and *.safetensors), an ONNX or GGUF file, or a directory with "
    "model.onnx; "
    "torch modules go through trimtab.compiler.from_torch"
)


def open_source(model: str | Path, *, allow_pickle: bool = False) -> Source:
    """Open a model. The first call exports a Hugging Face directory with torch; later calls use the cached file.

    Args:
        model: Hugging Face or sentence-transformers directory, ONNX or GGUF file, or directory with model.onnx.
        allow_pickle: read pickled weights, which can run code of their author.

    Raises:
        ModelError: `model` is not a model, is damaged, or cannot be exported; says why.
    """
    path = model_path(model)
    if is_gguf(path):
        return replace(_open_checkpoint(unpacked(path), allow_pickle=False), origin=str(path), kind="gguf")
    if is_checkpoint(path):
        return _open_checkpoint(path, allow_pickle)
    return _open_onnx(onnx_file(path) or path, path)


def model_path(model: str | Path) -> Path:
    """The path of a model, which is there and of a known kind. It is not read: callers know early that it is wrong.

    Raises:
        ModelError: there is no model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not is_checkpoint(path) and onnx_file(path) is None:
            raise ModelError(f"{path}: no model in this directory", hint=_ACCEPTED)
    elif not path.is_file():
        raise no_file(path, ModelError, "file or directory", hint=_ACCEPTED)
    elif path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        raise ModelError(f"{path}: weights alone, without the model they belong to", hint=_ACCEPTED)
    return path


def _open_checkpoint(folder: Path, allow_pickle: bool) -> Source:
    checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
    limit = token_limit(checkpoint.model, checkpoint.config)  # refuses damaged files before the long export
    head = UNKNOWN if checkpoint.pooling else model_head(checkpoint.config, folder)
    return Source(
        origin=str(folder),
        onnx=exported(checkpoint, allow_pickle=allow_pickle),
        tokenizer=tokenizer_folder(checkpoint.model, folder),
        labels=None if checkpoint.pooling else class_labels(checkpoint.config),
        max_tokens=limit,
        kind="huggingface",
        head=head,
    )


def _open_onnx(path: Path, origin: Path) -> Source:
    try_out(path, origin)  # refuses invalid files before anything else reads them
    # Repositories of the hub store ONNX files in a folder "onnx", and all other files at their root.
    places = (path.parent, path.parent.parent) if path.parent.name == "onnx" else (path.parent,)
    home = next((place for place in places if (place / "config.json").is_file()), path.parent)
    config, tokenizer = optional_config(home), tokenizer_folder(*places)
    return Source(
        origin=str(origin),
        onnx=path,
        tokenizer=tokenizer,
        labels=class_labels(config),
        max_tokens=token_limit(tokenizer or home, config),
        kind="onnx",
        head=model_head(config, home),
    )
