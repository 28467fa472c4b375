"""The task of a model: what its output means, and so how the model is evaluated and served.

`Head` stores what the model's files say about its logits, `find_task` adds what the graph shows. Triton models carry
this module, so it imports only numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from trimtab.passes.errors import ModelError

Kind = Literal["classes", "labels", "score", "tokens", "embedding", "states", "text"]


@dataclass(frozen=True)
class Head:
    """What config.json and similar files say about a model's logits.

    Attributes:
        problem: transformers' `problem_type`.
        activation: the activation that sentence-transformers' CrossEncoder applies to the logits: "sigmoid",
            "identity", or another class of torch in lower case; for other classes the full dotted name.
        width: number of logits.
    """

    problem: str | None = None
    activation: str | None = None
    width: int | None = None


UNKNOWN = Head()
"""The head of a model without such files."""


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Attributes:
        kind: "classes": one class per sample, by softmax of [samples, classes]; "labels": any number of labels per
            sample, by sigmoid of [samples, labels]; "score": numbers [samples, width], of a reranker or a regression;
            "tokens": a class for each token, [samples, tokens, classes]; "embedding": [samples, width]; "states":
            [samples, tokens, width], whose mean over the tokens is the embedding; "text": a decoder with its cache.
        output: name of that output.
        activation: converts the output to probabilities or scores: "softmax", "sigmoid", "identity" or "tanh"; any
            other name is one that the model's files ask for and trimtab does not compute.
    """

    kind: Kind
    output: str
    activation: str = "identity"

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Apply `activation` to `logits` [..., width]; the result has their type.

        Raises:
            ModelError: trimtab does not compute this activation.
        """
        if self.activation == "identity":
            return logits
        if self.activation == "sigmoid":
            small = np.exp(-np.abs(logits))  # at most 1, so that nothing overflows
            return np.asarray(np.where(logits >= 0, 1, small) / (1 + small), logits.dtype)
        if self.activation == "softmax":
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            return np.asarray(shares / shares.sum(-1, keepdims=True), logits.dtype)
        if self.activation == "tanh":
            return np.tanh(logits)
        raise ModelError(
            f"the model's configuration asks for the activation {self.activation!r}, which trimtab does not compute",
            hint="supported are sigmoid, identity, tanh and softmax; name one of torch.nn's in config.json "
            '("sentence_transformers": {"activation_fn": ...})',
        )


class _Tensor(Protocol):
    """An input or output of a graph, or of a manifest."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> Any: ...


def read_head(config: Mapping[str, Any], cross_encoder: Mapping[str, Any] | None = None) -> Head:
    """Read what a model's files say about its logits.

    Args:
        config: content of config.json.
        cross_encoder: content of config_sentence_transformers.json, to which sentence-transformers 6 writes what its
            versions 4 and 5 wrote to config.json. It takes precedence, as in that library.
    """
    candidates = [
        (cross_encoder or {}).get("activation_fn"),
        _mapping(config.get("sentence_transformers")).get("activation_fn"),
        config.get("sbert_ce_default_activation_function"),  # before version 4
    ]
    path = next((name for name in candidates if isinstance(name, str) and name), None)
    if path is not None and path.startswith("torch."):
        path = path.rpartition(".")[2].lower()
    problem = config.get("problem_type")
    width = len(_mapping(config.get("id2label"))) or config.get("num_labels")
    return Head(
        problem=problem if isinstance(problem, str) else None,
        activation=path,
        width=width if isinstance(width, int) else None,
    )


def find_task(inputs: Iterable[_Tensor], outputs: Iterable[_Tensor], head: Head = UNKNOWN) -> Task | None:
    """The task of a model with these inputs and outputs, or None if trimtab knows no use for its outputs."""
    shapes = {tensor.name: tensor.shape for tensor in outputs}
    ranks = {name: len(shape) if shape is not None else None for name, shape in shapes.items()}
    if "logits" in shapes:
        if any(tensor.name.startswith("past") for tensor in inputs):
            return Task("text", "logits", "softmax")
        if ranks["logits"] == 2:
            width = shapes["logits"][-1]
            return _logits_task(head, width if isinstance(width, int) else head.width)
        return Task("tokens", "logits", "softmax")
    if ranks.get("sentence_embedding") == 2:
        return Task("embedding", "sentence_embedding")
    if ranks.get("last_hidden_state") == 3:
        return Task("states", "last_hidden_state")
    return None


def _logits_task(head: Head, width: int | None) -> Task:
    """The task of logits [samples, width], as in transformers' pipelines and sentence-transformers' CrossEncoder.

    An activation that the files name takes precedence over the one that `problem_type` implies, and that over the
    default, which for one logit is the sigmoid in both libraries.
    """
    if head.problem == "multi_label_classification":
        return Task("labels", "logits", "sigmoid")
    if head.problem == "regression":
        return Task("score", "logits", head.activation or "identity")
    if width == 1:
        return Task("score", "logits", head.activation or "sigmoid")
    if head.activation == "sigmoid":
        return Task("labels", "logits", "sigmoid")
    if head.activation in (None, "identity", "softmax"):  # CrossEncoder does not change the logits of classes
        return Task("classes", "logits", "softmax")
    return Task("classes", "logits", str(head.activation))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
