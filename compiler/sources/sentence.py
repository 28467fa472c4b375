"""sentence-transformers folders: which pooling turns token states into the sentence embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from trimtab.compiler.sources.folder import optional_json, read_json
from trimtab.passes.errors import ModelError

MODES = ("mean", "cls")


class PoolingConfig(NamedTuple):
    """How token states become one embedding: `mode` is one of MODES; `normalize` divides by the L2 norm."""

    mode: str
    normalize: bool


def sentence_parts(folder: Path) -> tuple[Path, PoolingConfig | None]:
    """The folder of the transformer itself (`folder`, or one in it), and the pooling after it, if any.

    Raises:
        ModelError: a module or pooling mode that trimtab does not build.
    """
    if not (folder / "modules.json").is_file():
        pooling = folder / "1_Pooling" / "config.json"
        return folder, PoolingConfig(_mode(pooling), False) if pooling.is_file() else None
    transformer, mode, normalize = folder, None, False
    for module in read_json(folder / "modules.json"):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Transformer":
            transformer = folder / module["path"]
        elif kind == "Pooling":
            mode = _mode(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        else:
            raise ModelError(
                f"{folder}: its sentence-transformers module {kind} is not supported",
                hint="Transformer, Pooling and Normalize are; or export the model to ONNX and give that file",
            )
    return transformer, PoolingConfig(mode, normalize) if mode else None


def _mode(path: Path) -> str:
    config: dict[str, Any] = optional_json(path)
    if "pooling_mode" in config:
        named = config["pooling_mode"]
        modes = [named] if isinstance(named, str) else list(named)
    else:  # folders of sentence-transformers before 5 have one flag per mode, such as pooling_mode_mean_tokens
        flags = [
            key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on
        ]
        modes = [flag.removesuffix("_token").removesuffix("_tokens") for flag in flags] or ["mean"]
    if len(modes) != 1 or modes[0] not in MODES:
        raise ModelError(f"{path}: pooling {' + '.join(modes)} is not supported", hint=f"supported: {', '.join(MODES)}")
    return str(modes[0])
