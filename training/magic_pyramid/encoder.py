"""Which classifiers can be trained to a pyramid, and where their layers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from trimtab.compiler.data import Dataset
from trimtab.compiler.sources.checkpoint import Checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.folder import class_labels, model_head, tokenizer_folder
from trimtab.compiler.task import find_task
from trimtab.passes.errors import DataError, ModelError

_BERT = ("encoder.layer", "attention.self")
_LAYERS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT)
_LAYERS["distilbert"] = ("transformer.layer", "attention")
"""model_type → the layers of the base model, and in each the attention, which uses transformers' interface of it."""

_OTHERS = {
    "albert": "its layers share their weights",
    "deberta": "its attention is of relative positions",
    "deberta-v2": "its attention is of relative positions",
    "mpnet": "its attention is of relative positions",
    "xlnet": "its last token is classified, not its first",
}
_CLASSIFIER = "ForSequenceClassification"


class Layer(NamedTuple):
    """A layer of an encoder."""

    module: nn.Module
    attention: nn.Module


class Classifier(NamedTuple):
    """A model to train, and the names of its classes.

    Attributes:
        new_head: its classification head is random.
    """

    model: PreTrainedModel
    names: tuple[str, ...] | None
    new_head: bool


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """The layers of an encoder of BERT's kind, from the first to the last."""
    path, attention = _LAYERS[model.config.model_type]
    modules = model.base_model.get_submodule(path)
    assert isinstance(modules, nn.ModuleList)
    return [Layer(module, module.get_submodule(attention)) for module in modules]


def load_classifier(checkpoint: Checkpoint, dataset: Dataset, *, allow_pickle: bool) -> Classifier:
    """A classifier of texts; an encoder without a classification head gets one for the classes of `dataset`.

    Raises:
        ModelError: not an encoder of BERT's kind, fewer than two layers, or no classifier of one class for each text.
        DataError: the labels do not tell the classes of a new head.
    """
    _check_kind(checkpoint)
    name = checkpoint.architecture
    if name.endswith(_CLASSIFIER):
        model = load_model(checkpoint.model, name, allow_pickle=allow_pickle)
        names = class_labels(checkpoint.config)
        _check_task(checkpoint, int(model.config.num_labels or 0))
    else:
        names, count = _classes(dataset)
        options: dict[str, Any] = {} if allow_pickle else {"use_safetensors": True}
        if names is not None:
            options |= {"id2label": dict(enumerate(names)), "label2id": {each: i for i, each in enumerate(names)}}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            checkpoint.model, dtype=torch.float32, local_files_only=True, trust_remote_code=False, num_labels=count,
            **options,
        )  # fmt: skip
    if len(layers_of(model)) < 2:
        raise ModelError(f"{checkpoint.folder}: has one layer, and a pyramid needs two", hint="give a deeper model")
    return Classifier(model, names, not name.endswith(_CLASSIFIER))


def _check_kind(checkpoint: Checkpoint) -> None:
    kind = str(checkpoint.config.get("model_type"))
    if kind not in _LAYERS or checkpoint.config.get("is_decoder"):
        why = _OTHERS.get(kind, "it is no encoder of BERT's kind")
        raise ModelError(
            f"{checkpoint.folder}: --method magic-pyramid does not train {kind} models: {why}",
            hint=f"it trains {', '.join(_LAYERS)}",
        )


class _Logits(NamedTuple):
    name: str
    shape: Any


def _check_task(checkpoint: Checkpoint, width: int) -> None:
    head = model_head(checkpoint.config, checkpoint.model)
    task = find_task([], [_Logits("logits", ("batch", width))], head)
    if task is None or task.kind != "classes":
        what = "a score" if task is not None and task.kind == "score" else "any number of labels"
        raise ModelError(
            f"{checkpoint.folder}: --method magic-pyramid trains classifiers that give a text one class; this model "
            f"gives it {what}",
            hint="exits leave by the probability of a class, which it does not have; use --method recover",
        )


def _classes(dataset: Dataset) -> tuple[tuple[str, ...] | None, int]:
    """Names, where labels are names, and number of the classes of labelled texts."""
    labels = [label for _, label in dataset.texts]
    if all(isinstance(label, str) for label in labels):
        names: Sequence[str] = sorted({str(label) for label in labels})
    elif all(isinstance(label, int) and label >= 0 for label in labels):
        names = range(max(int(label) for label in labels if isinstance(label, int)) + 1)  # type: ignore[assignment]
    else:
        raise DataError(f"{dataset.path}: not every text has a class", hint="give each a number or a name as `label`")
    if len(names) < 2:
        raise DataError(f"{dataset.path}: all texts are of one class", hint="give data of two classes or more")
    return (None if isinstance(names, range) else tuple(names)), len(names)


def open_tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    folder = tokenizer_folder(checkpoint.folder, checkpoint.model)
    if folder is None:
        raise ModelError(f"{checkpoint.folder}: has no tokenizer", hint="save the model with its tokenizer")
    return folder
