"""Metrics of a pyramid on the held-out texts, computed like in its compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from transformers import EvalPrediction


def judge(prediction: EvalPrediction) -> dict[str, Any]:
    """Metrics for transformers' Trainer.

    Args:
        prediction: logits [samples, classes], exits [samples, exits, classes] and stay [samples, layers] of
            `Pyramid.forward`; labels [samples].

    Returns:
        accuracy of the final classifier, accuracy of each exit (`exits`), the temperature that calibrates each exit
        (`temperatures`), and share of all tokens that stay behind each layer (`kept`).
    """
    logits, exits, stay, tokens = (np.asarray(each) for each in prediction.predictions)
    labels = np.asarray(prediction.label_ids)
    temperatures = [_temperature(exits[:, i].astype(np.float64), labels) for i in range(exits.shape[1])]
    return {
        "temperatures": temperatures,
        "accuracy": float((logits.argmax(-1) == labels).mean()),
        "exits": [float(share) for share in (exits.argmax(-1) == labels[:, None]).mean(0)],
        "kept": [float(share) for share in stay.sum(0) / tokens.sum()],
    }


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that calibrates the probabilities of `logits` [samples, classes]: logits are divided by it.

    Guo et al. 2017 ("On calibration of modern neural networks", arXiv 1706.04599), section 4.2. With calibrated exits
    one threshold has the same meaning at all exits.
    """

    def surprise(log_temperature: float) -> float:
        rows = log_softmax(logits / np.exp(log_temperature), axis=-1)
        return float(-rows[np.arange(len(labels)), labels].mean())

    return float(np.exp(minimize_scalar(surprise, bounds=(-2.0, 2.0), method="bounded").x))


def row(stage: str, step: int, metrics: Mapping[str, Any], *, pruned: bool, left: bool) -> dict[str, Any]:
    """A row of the history with the metrics of one evaluation.

    Args:
        pruned: the model prunes by thresholds.
        left: exits have learned.
    """
    history_row = {"stage": stage, "step": step, "loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}
    if pruned:
        history_row["kept"] = metrics["eval_kept"]
    if left:
        history_row["exits"], history_row["temperatures"] = metrics["eval_exits"], metrics["eval_temperatures"]
    return history_row
