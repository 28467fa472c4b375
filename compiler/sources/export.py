"""`python -m trimtab.compiler.sources.export`: Hugging Face directory → ONNX file, in a child process.

The child frees torch's memory before the compile begins, and a crash of the exporter becomes one clear error.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from trimtab.compiler.sources.checkpoint import BASE
from trimtab.compiler.sources.child import leave_note, report
from trimtab.compiler.sources.config import load_config
from trimtab.compiler.sources.decoder import Decoder, why_uncached
from trimtab.compiler.sources.pooling import load_embedding
from trimtab.compiler.sources.transformer import Exportable, task_outputs
from trimtab.passes.errors import ModelError

_GENERATING = ("ForCausalLM", "LMHeadModel")
"""Name ends of architectures that are exported with their cache, if possible."""


def load_model(folder: Path, architecture: str, *, allow_pickle: bool = False) -> transformers.PreTrainedModel:
    """Load the model in float32 and eval mode. T5 models yield their encoder; `BASE` yields the class without a head.

    Raises:
        ModelError: transformers has no class `architecture`, or weights are missing.
    """
    if architecture == BASE:
        architecture = _base_architecture(folder)
    if architecture.endswith(("T5ForConditionalGeneration", "T5Model")):
        architecture = architecture[: architecture.index("T5") + 2] + "EncoderModel"
    outputs = task_outputs(architecture)
    model_class = getattr(transformers, architecture, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ModelError(
            f"transformers {transformers.__version__} has no architecture {architecture}",
            hint="install a transformers that has it, or export the model to ONNX yourself",
        )
    options: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
    load_config(folder)  # says what is wrong with it, where loading the model would end in a traceback
    # Any: with output_loading_info it returns a pair, which its annotations omit.
    loaded: Any = model_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True,
        attn_implementation="eager",  # some models fix their attention when they are constructed
        **options,
    )  # fmt: skip
    model: transformers.PreTrainedModel = loaded[0]
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{architecture} is an encoder-decoder", hint="of encoder-decoders, trimtab supports T5's encoder alone"
        )
    # Checkpoints often lack the pooler, which token states do not need.
    missing = [name for name in loaded[1]["missing_keys"] if "pooler." not in name or outputs != ("last_hidden_state",)]
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{folder}: the weights of {architecture} lack {sorted(missing)[0]}{rest}",
            hint="the checkpoint is of another architecture than config.json says, or incomplete",
        )
    if model._can_set_experts_implementation():
        # Only this implementation of mixtures of experts has a form in ONNX: each token gathers the weights of its
        # experts. The default implementation groups tokens by their expert, which torch does not export.
        model.set_experts_implementation("batched_mm")
    return model.eval()


def _base_architecture(folder: Path) -> str:
    """The name of the class that AutoModel loads for the model in `folder`."""
    config = load_config(folder)
    if type(config) not in transformers.AutoModel._model_mapping:
        raise ModelError(
            f"transformers {transformers.__version__} has no model without head for {config.model_type}",
            hint="name a class in `architectures` of config.json, or export the model to ONNX yourself",
        )
    classes: Any = transformers.AutoModel._model_mapping[type(config)]
    return str((classes[0] if isinstance(classes, tuple) else classes).__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("architecture")
    parser.add_argument("--allow-pickle", action="store_true")
    parser.add_argument("--sentence", nargs=2, metavar=("FOLDER", "JSON"))
    options = parser.parse_args(arguments)

    def work() -> None:
        model = load_model(options.folder, options.architecture, allow_pickle=options.allow_pickle)
        pooling = None
        if options.sentence:
            pooling = load_embedding(Path(options.sentence[0]), json.loads(options.sentence[1]))
        generating = options.architecture.endswith(_GENERATING)
        why_not = why_uncached(model) if generating else None
        if generating and why_not is None:
            Decoder(model).export(options.out / "model.onnx")
        else:
            Exportable(model, pooling).export(options.out / "model.onnx")
        if why_not is not None:
            leave_note(options.out, f"is exported without a cache, so it takes only whole texts: {why_not}")

    return report(options.out, work)


if __name__ == "__main__":
    raise SystemExit(main())
