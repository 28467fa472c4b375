"""Wraps a transformers model into a module of plain tensors: named inputs and outputs, dynamic batch and tokens."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trimtab.compiler.sources.pooling import Embedding
from trimtab.compiler.sources.torch_export import OTHER_MEANS, export_module
from trimtab.passes.errors import ModelError

_TASK_OUTPUTS = {
    "ForSequenceClassification": ("logits",),
    "ForTokenClassification": ("logits",),
    "ForQuestionAnswering": ("start_logits", "end_logits"),
    "ForMaskedLM": ("logits",),
    "ForCausalLM": ("logits",),
    "LMHeadModel": ("logits",),
    "ForImageClassification": ("logits",),
    "Model": ("last_hidden_state",),
}
"""End of an architecture's name → names of its outputs. The first end that fits counts."""


class Exportable(torch.nn.Module):
    """Wraps `model`, without a cache: takes tensors by position and returns tensors.

    Attributes:
        inputs: names of the inputs, which are arguments of the model's forward.
        outputs: names of the outputs.
    """

    def __init__(self, model: PreTrainedModel, pooling: Embedding | None = None) -> None:
        super().__init__()
        takes = inspect.signature(model.forward).parameters
        model.set_attn_implementation("eager")  # plain MatMul and Softmax, which every target knows
        model.config.use_cache = False
        self.model = model
        self.pooling = pooling
        self.inputs = _inputs(model)
        self.outputs = task_outputs(type(model).__name__) + (("sentence_embedding",) if pooling else ())
        self._positions = bool(getattr(model.config, "rope_parameters", None)) and "position_ids" in takes

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        feeds = dict(zip(self.inputs, tensors, strict=True))
        if self._positions:
            # The exporter fuses to RotaryEmbedding, whose cos and sin must have the batch dimension. Without this
            # input, the model computes them with a batch of 1, and the graph fails to run with any other batch.
            batch, tokens = tensors[0].shape
            feeds["position_ids"] = torch.arange(tokens, device=tensors[0].device).expand(batch, tokens)
        model_outputs = self.model(**feeds)
        outputs = [model_outputs[name] for name in self.outputs if name != "sentence_embedding"]
        if self.pooling is not None:
            outputs.append(self.pooling(outputs[0], feeds["attention_mask"]))
        return tuple(outputs)

    def examples(self) -> tuple[torch.Tensor, ...]:
        """One example per input, of batch 2 and 7 tokens. torch treats neither size as a constant."""
        config = self.model.config
        if self.inputs == ("pixel_values",):
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            return (torch.zeros(2, config.num_channels, height, width),)
        return tuple(torch.ones(2, 7, dtype=torch.int64) for _ in self.inputs)

    def export(self, path: Path) -> None:
        """Write the ONNX file. Its dynamic dimensions are called "batch" and "tokens"."""
        image = self.inputs == ("pixel_values",)
        dims = {0: "batch"} if image else {0: "batch", 1: "tokens"}
        export_module(
            self,
            self.examples(),
            path,
            dynamic_shapes=(tuple(dims for _ in self.inputs),),
            input_names=self.inputs,
            output_names=self.outputs,
            name=type(self.model).__name__,
            hint=OTHER_MEANS,
        )


def task_outputs(architecture: str) -> tuple[str, ...]:
    """Names of the outputs of `architecture`, such as ("logits",).

    Raises:
        ModelError: trimtab does not support the architecture.
    """
    for end, outputs in _TASK_OUTPUTS.items():
        if architecture.endswith(end):
            return outputs
    raise ModelError(
        f"architecture {architecture} is not supported",
        hint="supported: "
        + ", ".join(f"*{end}" for end in _TASK_OUTPUTS)
        + "; or export it to ONNX and give that file",
    )


def _inputs(model: PreTrainedModel) -> tuple[str, ...]:
    main = model.main_input_name
    if main == "pixel_values":
        return (main,)
    if main != "input_ids":
        raise ModelError(
            f"{type(model).__name__} reads {main}; text (input_ids) and images (pixel_values) are supported",
            hint="export the model to ONNX yourself",
        )
    takes = inspect.signature(model.forward).parameters
    names = ["input_ids"]
    if "attention_mask" in takes:
        names.append("attention_mask")
    if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return tuple(names)
