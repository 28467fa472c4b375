"""Metrics of a routed model on the held-out texts, computed like in its compiled model."""

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
        prediction: outputs of `Routed.forward` besides the loss, and labels.
        groups: number of groups of each FFN.

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
    """A row of the history with the metrics of one evaluation."""
    loss = float(metrics["eval_loss"])
    history_row: dict[str, Any] = {"stage": stage, "step": step, "loss": loss}
    if "eval_accuracy" in metrics:
        history_row["accuracy"] = metrics["eval_accuracy"]
    else:
        history_row["perplexity"] = math.exp(min(loss, 100.0))
    return history_row | {"sparsity": metrics["eval_sparsity"], "density": metrics["eval_density"]}
