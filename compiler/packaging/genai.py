"""A folder that ONNX Runtime GenAI loads: model, tokenizer, the native kernels, and genai_config.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.build import Build, check_outside, of_one_build
from trimtab.compiler.builds.contents import TOKENIZER
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.decoder_cache import LOGITS, PAST, PRESENT, pasts
from trimtab.compiler.targets.base import MODEL
from trimtab.compiler.targets.sessions import uses_dialect
from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.errors import BuildError, ModelError
from trimtab.passes.graph import load_graph
from trimtab.passes.os_errors import blames, reason, remedy, unreadable
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins.library import library_path

CONFIG = "genai_config.json"
_TOKENS = 2048  # context of a model that does not state its own


@of_one_build
def package_genai(build: Build, out: Path | str) -> Path:
    """Write `out`, whole or not at all.

    Raises:
        BuildError: `out` exists, or cannot be written, or the build was replaced.
        ModelError: the build is not a language model with a cache, or has no tokenizer.
    """
    out = Path(out)
    if out.exists():
        raise BuildError(f"{out}: exists already", hint="give a folder that does not exist")
    check_outside(out)
    if build.manifest.target != "onnxruntime":
        raise ModelError(f"{build.path}: was built for {build.manifest.target}", hint="compile for onnxruntime")
    if build.manifest.shards > 1:
        raise ModelError(
            f"{build.path}: is divided into {build.manifest.shards} shards, and ONNX Runtime GenAI runs one graph",
            hint="compile it without --shards",
        )
    model = build.path / MODEL
    graph = load_graph(model)
    if not pasts(tensor.name for tensor in graph.inputs):
        raise ModelError(f"{build.path}: has no cache of keys and values", hint="compile a causal language model")
    if build.tokenizer is None:
        raise ModelError(f"{build.path}: has no tokenizer", hint="compile a directory that has one")
    library = library_path() if uses_dialect(model) else None
    config = _config(build, find_anatomy(graph), library)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder("package", out.parent) as scratch:
            part = scratch / "package"
            part.mkdir()
            with build.unchanged():
                files = [*build.files_in(MODEL.parent), *build.files_in(TOKENIZER)]
                for path in (*files, *([library] if library else [])):
                    shutil.copyfile(path, part / path.name)
            (part / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            part.rename(out)
    except OSError as error:
        if not blames(error, out.parent):
            raise unreadable(error.filename, error, BuildError) from error
        raise BuildError(f"{out}: cannot be written ({reason(error)})", hint=remedy(error, out.parent)) from error
    return out


def _config(build: Build, anatomy: Anatomy, library: Path | None) -> dict[str, Any]:
    attention, table = anatomy.attentions[0], anatomy.embeddings[0].table
    tokenizer = load_tokenizer(build.tokenizer, build.manifest.max_tokens) if build.tokenizer is not None else None
    assert tokenizer is not None
    context = build.manifest.max_tokens or _TOKENS
    ends = sorted(tokenizer.end_ids)
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if library is not None:
        options["custom_ops_library"] = library.name  # GenAI loads the library only from this folder
    if build.manifest.recipe["threads"]:
        options["intra_op_num_threads"] = build.manifest.recipe["threads"]
    decoder = {
        "session_options": options,
        "filename": MODEL.name,
        "head_size": attention.head_dim,
        "hidden_size": int(table.shape[1]),
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "past_key_names": f"{PAST}%d.key", "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": LOGITS, "present_key_names": f"{PRESENT}%d.key", "present_value_names": f"{PRESENT}%d.value",
        },
        "num_attention_heads": attention.heads,
        "num_hidden_layers": len(anatomy.attentions),
        "num_key_value_heads": attention.kv_heads,
    }  # fmt: skip
    model = {
        "type": "llama",  # GenAI's type for any decoder with this interface
        "vocab_size": int(table.shape[0]), "context_length": context, "pad_token_id": tokenizer.pad_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else tokenizer.pad_id,
        "bos_token_id": tokenizer.prompts(["a"])[0][0], "decoder": decoder,
    }  # fmt: skip
    search = {"max_length": context, "do_sample": False, "past_present_share_buffer": True, "num_beams": 1}
    return {"model": model, "search": search}
