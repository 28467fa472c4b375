"""Reads sentence-transformers folders: the modules between a transformer's states and the sentence embedding."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from trimtab.compiler.data.preparation import (
    MODULES,
    SENTENCE_CONFIG,
    TOKENIZER_CONFIG,
    read_preparation,
    transformer_config,
)
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.schema.json_text import AGAIN, Schema, mismatch, optional_json, read_json
from trimtab.compiler.sources.folder import architecture, optional_config, tokenizer_folder
from trimtab.passes.errors import ModelError

MODES = {
    "cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
}  # fmt: skip
"""Pooling mode → its flag `pooling_mode_FLAG` in files of versions before 5, in the order of concatenation."""

WEIGHTED = ("Dense", "LayerNorm")
"""Modules behind the pooling that have weights."""

_BEHIND = (*WEIGHTED, "Normalize", "Dropout")
_EXPORT = "export the model to ONNX and give that file"
_HARMLESS = {
    "model": {"dtype", "torch_dtype", "attn_implementation", "trust_remote_code"},
    "processor": {"model_max_length", "padding_side", "use_fast", "trust_remote_code"},
    "config": {"trust_remote_code"},
}
"""Options of the Transformer module that do not change the embedding, or that trimtab reads elsewhere."""


_MODULE: Schema = {
    "in_features": int, "out_features": int, "dimension": int, "bias": bool, "use_residual": bool,
    "activation_function": str, "module_input_name": str, "module_output_name": str,
}  # fmt: skip
"""The keys that trimtab reads in the config.json of a module behind the pooling."""


class Layer(NamedTuple):
    """A module of modules.json: its class, its folder below the model's, and its config.json ({} up to the pooling)."""

    kind: str
    path: str
    config: dict[str, Any]


class SentenceConfig(NamedTuple):
    """How token states become one embedding.

    Attributes:
        modes: keys of MODES; the results of several modes are concatenated.
        skip: number of tokens at the beginning, those of a prompt, that are not pooled.
        layers: the modules behind the pooling, in order.
        width: number of leading dimensions of the embedding that are kept; None keeps all.
    """

    modes: tuple[str, ...]
    skip: int = 0
    layers: tuple[Layer, ...] = ()
    width: int | None = None


def sentence_parts(folder: Path) -> tuple[Path, SentenceConfig | None]:
    """Find the transformer's folder (`folder`, or one in it) and the modules behind the transformer, if any.

    Raises:
        ModelError: trimtab does not support a module, an option or a pooling mode; names it.
    """
    if not (folder / "modules.json").is_file():
        return folder, _without_modules(folder)
    modules = _modules(folder)
    config = optional_json(folder / "config_sentence_transformers.json", ModelError, SENTENCE_CONFIG)
    model_type = config.get("model_type", "SentenceTransformer")
    if model_type not in ("SentenceTransformer", "CrossEncoder"):
        raise ModelError(f"{folder}: a {model_type} of sentence-transformers is not supported", hint=_EXPORT)
    first, *rest = modules
    if first.kind != "Transformer":
        raise _unsupported(folder, first.kind)
    if not os.path.isdir(folder / first.path):
        raise ModelError(
            f"{folder / 'modules.json'}: the transformer's folder {first.path[:80]!r} is missing", hint=AGAIN
        )
    if model_type == "CrossEncoder":  # a classifier like any other
        if rest:
            raise _unsupported(folder, rest[0].kind)
        return folder / first.path, None
    _check_transformer(folder / first.path, folder)
    if not rest or rest[0].kind != "Pooling":
        raise (
            _unsupported(folder, rest[0].kind)
            if rest
            else ModelError(
                f"{folder}: its modules.json has no Pooling, so there is no sentence embedding",
                hint="give the folder of the transformer, without modules.json",
            )
        )
    modes, with_prompt = _pooling(folder / rest[0].path / "config.json")
    for module in rest[1:]:
        if module.kind not in _BEHIND:
            raise _unsupported(folder, module.kind)
        _check_names(folder / module.path / "config.json", module)
    width = config.get("truncate_dim")
    if width is not None and width < 0:
        raise ModelError(f"{folder}: truncate_dim of its sentence-transformers configuration is {width}", hint=AGAIN)
    return folder / first.path, SentenceConfig(
        modes,
        0 if with_prompt else _prompt_tokens(folder / first.path, folder),
        tuple(module for module in rest[1:] if module.kind != "Dropout"),
        int(width) if width else None,
    )


def _modules(folder: Path) -> list[Layer]:
    path = folder / "modules.json"
    listed = read_json(path, ModelError, MODULES)
    if not listed:
        raise ModelError(f"{path}: names no module", hint=AGAIN)
    modules = []
    for module in listed:
        kind, place = module.get("type"), module.get("path") or ""
        if kind is None:
            raise ModelError(f"{path}: a module has no type", hint=AGAIN)
        if not kind.startswith("sentence_transformers."):
            raise ModelError(f"{path}: module {kind} brings its own code, which trimtab never runs", hint=_EXPORT)
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise ModelError(f"{path}: module {kind} is outside the folder ({place})", hint="save the model again")
        name = kind.rpartition(".")[2]
        config = optional_json(folder / place / "config.json", ModelError, _MODULE) if name in _BEHIND else {}
        modules.append(Layer(name, place, config))
    return modules


def _unsupported(folder: Path, kind: str) -> ModelError:
    return ModelError(
        f"{folder}: its sentence-transformers module {kind} is not supported there",
        hint="Transformer, Pooling, and behind them Dense, LayerNorm and Normalize are; or " + _EXPORT,
    )


def _without_modules(folder: Path) -> SentenceConfig | None:
    """The pooling of a folder without modules.json; None for an ordinary model.

    sentence-transformers pools such a folder with its default mode.

    Raises:
        ModelError: 1_Pooling in the folder has another mode than the default.
    """
    pooling = folder / "1_Pooling" / "config.json"
    if not pooling.is_file():
        return None
    modes, with_prompt = _pooling(pooling)
    default = "lasttoken" if architecture(optional_config(folder)).endswith("ForCausalLM") else "mean"
    if modes != (default,) or not with_prompt:
        raise ModelError(
            f"{pooling}: pools by {' + '.join(modes)}, but there is no modules.json that says so, and without one "
            f"sentence-transformers takes {default}",
            hint="download the model's modules.json, or remove 1_Pooling",
        )
    return SentenceConfig(modes)


def _pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    """Read the modes in a Pooling's config.json, and whether the prompt's tokens are pooled."""
    config = read_json(path, ModelError, {"include_prompt": bool})
    mode_names = config.get("pooling_mode")
    if mode_names is not None:
        modes = [mode_names] if isinstance(mode_names, str) else mode_names
        if (wrong := mismatch(modes, [str])) is not None:
            raise ModelError(f"{path}: pooling_mode {wrong}", hint=AGAIN)
    else:
        modes = [mode for mode, flag in MODES.items() if config.get(f"pooling_mode_{flag}")] or ["mean"]
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ModelError(f"{path}: pooling {unknown} is not supported", hint=f"supported: {', '.join(MODES)}")
    return tuple(modes), bool(config.get("include_prompt", True))


def _prompt_tokens(transformer: Path, folder: Path) -> int:
    tokenizer = tokenizer_folder(transformer, folder)
    if tokenizer is None or not read_preparation(tokenizer).prompt:
        return 0
    return load_tokenizer(tokenizer).prompt_tokens()


def _check_transformer(folder: Path, root: Path) -> None:
    """Check that the Transformer module returns the last hidden states of plain texts, as the exported graph does."""
    config, where = transformer_config(folder), f"{folder}: its sentence-transformers Transformer module"
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ModelError(f"{where} is for the task {task}, which is not supported", hint=_EXPORT)
    modalities = config.get("modality_config")
    templates = [place for place in (folder, root) if _has_chat_template(place)]
    if (modalities is None and templates) or "message" in (modalities or {}):
        raise ModelError(f"{where} puts texts into a chat template, which is not supported", hint=_EXPORT)
    states = {"method": "forward", "method_output_name": "last_hidden_state"}
    if modalities is not None and modalities.get("text") != states:
        raise ModelError(f"{where} takes other states than the last (modality_config)", hint=_EXPORT)
    if config.get("processing_kwargs"):
        raise ModelError(f"{where} has processing_kwargs, which are not supported", hint=_EXPORT)
    for kind, old in (("model", "model_args"), ("processor", "tokenizer_args"), ("config", "config_args")):
        options = config.get(old) or config.get(f"{kind}_kwargs") or {}
        unknown = sorted(set(options) - _HARMLESS[kind])
        if unknown:
            raise ModelError(f"{where} sets {unknown[0]!r} ({kind}_kwargs), which is not supported", hint=_EXPORT)


def _has_chat_template(folder: Path) -> bool:
    names = ("chat_template.jinja", "chat_template.json")
    return any((folder / name).is_file() for name in names) or bool(
        optional_json(folder / "tokenizer_config.json", ModelError, TOKENIZER_CONFIG).get("chat_template")
    )


def _check_names(path: Path, module: Layer) -> None:
    """Check that a module behind the pooling reads and writes the embedding."""
    for key in ("module_input_name", "module_output_name"):
        name = module.config.get(key) or "sentence_embedding"
        if name != "sentence_embedding":
            raise ModelError(f"{path}: {module.kind} with {key} {name!r} is not supported", hint=_EXPORT)
