"""How well a pyramid does on the held-out texts, as its compiled model would."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import EvalPrediction


def judge(prediction: EvalPrediction) -> dict[str, Any]:
    """Metrics for transformers' Trainer.

    Args:
        prediction: logits [samples, classes], exits [samples, layers - 1, classes] and stay [samples, layers] of
            `Pyramid.forward`; labels [samples].

    Returns:
        accuracy of the final classifier, accuracy of each exit (`exits`), and share of all tokens that stay behind each
        layer (`kept`).
    """
    logits, exits, stay, tokens = (np.asarray(each) for each in prediction.predictions)
    labels = np.asarray(prediction.label_ids)
    return {
        "accuracy": float((logits.argmax(-1) == labels).mean()),
        "exits": [float(share) for share in (exits.argmax(-1) == labels[:, None]).mean(0)],
        "kept": [float(share) for share in stay.sum(0) / tokens.sum()],
    }


def row(stage: str, step: int, metrics: dict[str, Any], *, pruned: bool, left: bool) -> dict[str, Any]:
    """A row of the history, of the metrics of a look.

    Args:
        pruned: there are thresholds.
        left: exits have learned.
    """
    found = {"stage": stage, "step": step, "loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}
    if pruned:
        found["kept"] = metrics["eval_kept"]
    if left:
        found["exits"] = metrics["eval_exits"]
    return found
