"""Reads a Hugging Face directory without torch, and checks that it is complete, undamaged and safe to load."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.schema.json_text import AGAIN, Schema, read_json
from trimtab.compiler.sources.child import content_key, run_child
from trimtab.compiler.sources.folder import architecture, read_config
from trimtab.compiler.sources.sentence import WEIGHTED, SentenceConfig, sentence_parts
from trimtab.passes.errors import ModelError
from trimtab.passes.hashing import hash_bytes
from trimtab.passes.optional import require_packages
from trimtab.passes.os_errors import check_readable

BASE = "AutoModel"
"""Names the class without a head. sentence-transformers loads it even if config.json names a class with a head."""

_ARCHITECTURE_FILE = "architecture.json"  # written by the child that finds the architecture
_MAX_SECONDS = 300.0  # limit of that child, which takes some seconds
_PACKAGES = ("torch", "transformers")
_INDEX: Schema = {"weight_map": {"*": str}}
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's config and weights.

    Attributes:
        folder: the directory that the user gave.
        model: the directory of config.json and the weights: `folder`, or a subdirectory.
        config: the content of config.json.
        architecture: name of the transformers class; `BASE` in a sentence-transformers folder.
        weights: the weight files.
        pooling: the modules behind the transformer in a sentence-transformers folder, else None.
    """

    folder: Path
    model: Path
    config: dict[str, Any]
    architecture: str
    weights: tuple[Path, ...]
    pooling: SentenceConfig | None

    @property
    def digest(self) -> str:
        """A hash of everything that decides the export: configuration, and every byte of the weights."""
        hashes = [f"{path.name} {file_hash(path)}" for path in self.weights]
        return hash_bytes(json.dumps([self.config, self.pooling], sort_keys=True), *hashes)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a Hugging Face directory: it has a config, and weights or at least no ONNX file."""
    modules = (folder / "modules.json").is_file()
    if not modules and not (folder / "config.json").is_file():
        return False
    places = [folder, *(place for place in folder.iterdir() if modules and place.is_dir())]
    return any(map(_has_weights, places)) or onnx_file(folder) is None


def onnx_file(folder: Path) -> Path | None:
    """Find the ONNX model of a directory: model.onnx, or onnx/model.onnx as in repositories of Hugging Face's hub."""
    return next((path for name in ("model.onnx", "onnx/model.onnx") if (path := folder / name).is_file()), None)


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Read the configuration of a Hugging Face directory and find its weights.

    Raises:
        ModelError: the model needs its own code, its weights have an unsupported format, or a file is damaged.
    """
    model, pooling = sentence_parts(folder)
    config = read_config(model / "config.json")
    if config.get("auto_map"):
        raise ModelError(
            f"{folder}: the model brings its own code (auto_map in config.json), which trimtab never runs",
            hint="load it yourself and give the module to trimtab.compiler.from_torch, or export it to ONNX",
        )
    if (quantization := config.get("quantization_config")) is not None:
        raise ModelError(
            f"{folder}: the checkpoint is quantized ({str(quantization.get('quant_method', 'unknown'))[:40]})",
            hint="give the unquantized checkpoint; trimtab's passes quantize it",
        )
    if (model / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds an adapter of another model (adapter_config.json)",
            hint="merge it into its model (peft's merge_and_unload), save that, and give its folder",
        )
    if pooling is not None:
        weighted = [folder / layer.path for layer in pooling.layers if layer.kind in WEIGHTED]
        weights = tuple(path for place in (model, *weighted) for path in _weight_files(place, allow_pickle))
        return Checkpoint(folder, model, config, BASE, weights, pooling)
    weights = _weight_files(model, allow_pickle)
    if not config.get("architectures"):
        config |= {"architectures": [_find_architecture(model, config, weights)]}
    return Checkpoint(folder, model, config, architecture(config), weights, pooling)


def _find_architecture(model: Path, config: dict[str, Any], weights: tuple[Path, ...]) -> str:
    """Find the architecture of a model whose config.json names none, in a child: see `architecture.py`."""
    if config.get("model_type") is None or any(path.suffix != ".safetensors" for path in weights):
        raise ModelError(
            f"{model / 'config.json'}: names no architecture",
            hint='add the class of the model, such as "architectures": ["BertModel"]',
        )
    require_packages(_PACKAGES, ModelError, what=f"{model}: reading a Hugging Face model", extra="huggingface")

    def make(part: Path) -> None:
        part.mkdir()
        run_child(
            "trimtab.compiler.sources.architecture", [str(model.resolve()), str(part)], part, makes=_ARCHITECTURE_FILE,
            origin=model, what="finding its architecture", hint="add `architectures` to config.json",
            timeout_s=_MAX_SECONDS,
        )  # fmt: skip

    content = hash_bytes(json.dumps(config, sort_keys=True), *map(file_hash, weights))
    result = (
        entry("architectures", content_key(content, ("architecture.py", "config.py"), _PACKAGES), make)
        / _ARCHITECTURE_FILE
    )
    return str(read_json(result, ModelError, str))


def _has_weights(folder: Path) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", *_PICKLES))


def _weight_files(folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    """Find the weight files that transformers would read, in its order of preference."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return (_check_weights(whole),)
    if index.is_file():
        names = sorted(set((read_json(index, ModelError, _INDEX).get("weight_map") or {}).values()))
        if not names:
            raise ModelError(f"{index}: names no weights", hint=AGAIN)
        for name in names:
            if Path(name).name != name or not os.path.isfile(folder / name):
                raise ModelError(
                    f"{index}: names the weight file {name[:80]!r}, which is not in the folder",
                    hint="download the rest",
                )
        return tuple(_check_weights(folder / name) for name in names)
    pickles = tuple(sorted(path for pattern in _PICKLES for path in folder.glob(pattern)))
    if not pickles:
        raise ModelError(f"{folder}: has a config, but no model.safetensors", hint="download the weights as well")
    if not allow_pickle:
        raise ModelError(
            f"{folder}: its weights are pickled ({pickles[0].name}), and reading them can run code of their author",
            hint="convert them to safetensors, or pass --allow-pickle (in Python allow_pickle=True) if you trust them",
        )
    return pickles


def _check_weights(path: Path) -> Path:
    check_readable(path, ModelError)
    try:
        with safe_open(path, framework="numpy"):  # reads the header and compares it with the file's size
            return path
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: truncated, or not a safetensors file ({error})", hint="download it again") from error
