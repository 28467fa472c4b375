"""How well a routed model does on the held-out texts, as its compiled model would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction

from trimtab.training.examples import Kind


def judge(prediction: EvalPrediction, groups: Sequence[int], kind: Kind) -> dict[str, Any]:
    """Metrics for transformers' Trainer.

    Args:
        prediction: what `Routed.forward` returns besides the loss, and labels.
        groups: of each FFN.

    Returns:
        density, the share of each FFN's neurons that is computed; sparsity, the share of all that is not; and accuracy
        of a classifier.
    """
    *logits, chosen, tokens = (np.asarray(each) for each in prediction.predictions)
    counts, all_of = chosen.sum(0, dtype=np.float64), tokens.sum(dtype=np.float64) * np.asarray(groups)
    metrics: dict[str, Any] = {
        "density": [float(each) for each in counts / all_of], "sparsity": float(1 - counts.sum() / all_of.sum()),
    }  # fmt: skip
    if kind == "classifier":
        metrics["accuracy"] = float((logits[0].argmax(-1) == np.asarray(prediction.label_ids)).mean())
    return metrics


def row(stage: str, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the history, of the metrics of a look."""
    loss = float(metrics["eval_loss"])
    made: dict[str, Any] = {"stage": stage, "step": step, "loss": loss}
    if "eval_accuracy" in metrics:
        made["accuracy"] = metrics["eval_accuracy"]
    else:
        made["perplexity"] = math.exp(min(loss, 100.0))
    return made | {"sparsity": metrics["eval_sparsity"], "density": metrics["eval_density"]}
