"""`python -m trimtab.compiler.sources.gguf_unpack FILE FOLDER`: a GGUF file → a Hugging Face directory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as reading

from trimtab.compiler.sources.child import report
from trimtab.compiler.sources.gguf_header import Header, check_tensors, read_header
from trimtab.passes.errors import ModelError
from trimtab.passes.temporary import temporary_folder

_AGAIN = "download it again"
_CHECKPOINT = "give the model's Hugging Face checkpoint"
_FREQUENCIES = "rope_freqs.weight"
_NO_MODELS = {"general", "tokenizer"}
"""Entries of transformers' list of architectures that are no architectures."""


def unpack(path: Path, folder: Path) -> None:
    """Write config.json, model.safetensors in float32 and the tokenizer of the GGUF file into `folder`.

    Raises:
        ModelError: the file is damaged, or transformers does not read it as llama.cpp does.
    """
    header = read_header(path)
    check_tensors(header, {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()})
    architecture = _check(header, path)
    with temporary_folder("gguf") as scratch:  # without the file's neighbours, which belong to other models
        link = scratch / "model.gguf"
        link.symlink_to(path.resolve())
        _convert(link, folder, architecture, tokens="tokenizer.ggml.tokens" in header.values)


def _convert(path: Path, folder: Path, architecture: str, *, tokens: bool) -> None:
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        # Any: with output_loading_info it returns a pair, which its annotations omit.
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    except Exception as error:  # any: a damaged value can raise anything there
        raise ModelError(
            f"transformers {transformers.__version__} cannot read this file of {architecture} ({_first_line(error)})",
            hint=_CHECKPOINT,
        ) from error
    model, info = loaded
    missing = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"the file lacks {missing[0]}{rest}, or has it in another size", hint=_AGAIN)
    # The model is now in float32. With its quantizer, transformers would save it as quantized, or not at all.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    if tokens:
        _save_tokenizer(path.parent, folder, options)


def _check(header: Header, path: Path) -> str:
    """Return the architecture.

    Raises:
        ModelError: transformers cannot read the file, or would read it as another model.
    """
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError("names no architecture (general.architecture)", hint=_AGAIN)
    supported = {_plain(name) for name in reading.GGUF_SUPPORTED_ARCHITECTURES} - _NO_MODELS
    if _plain(architecture) not in supported:
        raise ModelError(
            f"transformers {transformers.__version__} reads no GGUF of architecture {architecture!r}", hint=_CHECKPOINT
        )
    if not header.tensors:
        raise ModelError("has a vocabulary, but no weights", hint="give the file of the model itself")
    parts = header.values.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"is one of {parts} parts", hint="join the parts (llama-gguf-split --merge), and give the whole file"
        )
    for kind in sorted({tensor.kind for tensor in header.tensors}):
        if not _can_dequantize(gguf.GGMLQuantizationType(kind)):
            raise ModelError(
                f"weights of type {gguf.GGMLQuantizationType(kind).name}, which gguf cannot dequantize",
                hint="give a file with other types, such as Q8_0, Q4_K_M or F16",
            )
    _check_positions(header, architecture, path)
    return architecture


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")


def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _check_positions(header: Header, architecture: str, path: Path) -> None:
    """Refuse rotary factors and rotary scaling, which transformers 5.23 ignores without a warning."""
    for tensor in header.tensors:
        if tensor.name != _FREQUENCIES:
            continue
        factors = np.fromfile(path, np.float32, tensor.shape[0], offset=tensor.offset)
        if tensor.kind != gguf.GGMLQuantizationType.F32 or (factors != 1).any():
            raise ModelError(
                f"rotates positions by factors of its own ({_FREQUENCIES}), which transformers leaves out",
                hint=_CHECKPOINT,
            )
    scaling = header.values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" and not _is_mapped(architecture, "rope.scaling.type"):
        raise ModelError(
            f"scales positions ({scaling}), which transformers leaves out of a file of {architecture}",
            hint=_CHECKPOINT,
        )


def _is_mapped(architecture: str, key: str) -> bool:
    mappings: Any = reading.GGUF_TO_TRANSFORMERS_MAPPING
    keys = mappings["config"].get(architecture.replace("-", "_"), {})
    return keys.get(key, -1) not in (-1, None)


def _save_tokenizer(source: Path, folder: Path, options: dict[str, Any]) -> None:
    try:
        transformers.AutoTokenizer.from_pretrained(source, **options).save_pretrained(folder)
    except Exception as error:  # any, as above
        print(f"no tokenizer: {_first_line(error)}", flush=True)  # a model without a tokenizer takes arrays of tokens


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    return report(options.folder, lambda: unpack(options.file, options.folder))


if __name__ == "__main__":
    raise SystemExit(main())
