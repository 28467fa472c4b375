"""Training data for a Hugging Face model's own task: texts for language models, labelled texts for classifiers."""

from __future__ import annotations

from typing import Literal

import numpy as np
from transformers import PreTrainedModel

from trimtab.compiler.data import Dataset
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.sources import Source
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.compiler.task import find_task
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import load_graph
from trimtab.training.contract import Settings
from trimtab.training.texts import Examples, labelled, packed

Kind = Literal["language model", "classifier"]


def kind_of(checkpoint: Checkpoint) -> Kind:
    """The kind of the model, which decides its task and loss.

    Raises:
        ModelError: the model is of neither kind.
    """
    if checkpoint.architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "language model"
    if checkpoint.architecture.endswith("ForSequenceClassification"):
        return "classifier"
    raise ModelError(
        f"{checkpoint.architecture} has no loss to learn from", hint="give a causal language model or a text classifier"
    )


def read_examples(
    source: Source, checkpoint: Checkpoint, model: PreTrainedModel, dataset: Dataset, settings: Settings, method: str
) -> Examples:
    """Read the texts of `dataset` as training examples for `model`.

    Args:
        method: name of the training method in messages.

    Raises:
        ModelError: the model is of another kind, or has no tokenizer.
        DataError: the texts do not fit the model's task.
    """
    if source.tokenizer is None:
        raise ModelError(f"{checkpoint.folder}: has no tokenizer", hint="save the model with its tokenizer")
    tokenizer, rng = load_tokenizer(source.tokenizer), np.random.default_rng(settings.seed)
    limit = min(settings.max_tokens, source.max_tokens or settings.max_tokens)
    if kind_of(checkpoint) == "language model":
        return packed(dataset, tokenizer, limit, rng)
    graph = load_graph(source.onnx)
    task = find_task(graph.inputs, graph.outputs, source.head)
    if task is None or task.kind != "classes":
        raise ModelError(
            f"{checkpoint.folder}: --method {method} trains classifiers that give a text one class; this model gives "
            f"it {'a score' if task is not None and task.kind == 'score' else 'any number of labels'}",
            hint="fine-tune it yourself, or use --method recover, which distils any model",
        )
    return labelled(dataset, tokenizer, source.labels, int(model.config.num_labels or 0), limit, rng)
