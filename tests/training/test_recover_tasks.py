"""Recovery of models whose logits are no classes: scores, and any number of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from heads import head_model, pairs, save_onnx, texts
from recovery import ZeroNeurons, empty_profile, recipe
from scipy.special import expit

from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.sources import Source, open_source
from trimtab.passes.errors import DataError, ModelError
from trimtab.training.losses import binary_divergence
from trimtab.training.recover.objective import Objective
from trimtab.training.recover.recover import recover
from trimtab.training.recover.settings import Settings

SHORT = Settings(minutes=5, steps=30, lr=2e-3, batch_size=16, max_tokens=48)
SEED = 5
"""Of models that learn in these few steps: at so high a rate, one random model in six does not."""
HEADS: dict[str, dict[str, Any]] = {
    "score": {"num_labels": 1},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "labels": {
        "num_labels": 3, "problem_type": "multi_label_classification",
        "id2label": dict(enumerate("abc")), "label2id": {name: i for i, name in enumerate("abc")},
    },
}  # fmt: skip


def source_of(kind: str, folder: Path) -> Source:
    print(f"seed {SEED}")
    return open_source(save_onnx(head_model("bert", SEED, **HEADS[kind]), folder / kind))


def data_of(folder: Path, labels: list[Any], given: list[Any]) -> Dataset:
    records = [
        {"text": text[0], "text_pair": text[1], "label": label} if isinstance(text, tuple) else
        {"text": text, "label": label} for text, label in zip(given, labels, strict=True)
    ]  # fmt: skip
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_data(path)


def learned(source: Source, data: Dataset, settings: Settings) -> dict[str, Any]:
    """The record of a recovery."""
    return recover(source, recipe(ZeroNeurons()), data, empty_profile(source), settings).info.learned["recover"]


@pytest.mark.parametrize("kind", list(HEADS))
def test_outputs_come_nearer_to_the_dense(kind: str, tmp_path: Path) -> None:
    """By the softmax of one logit there would be nothing to learn: it is 1 whatever the logit."""
    source, rng = source_of(kind, tmp_path), np.random.default_rng(SEED)
    given = texts(rng, 120) if kind == "labels" else pairs(rng, 120)
    profile = recover(
        source, recipe(ZeroNeurons()), data_of(tmp_path, [None] * 120, given), empty_profile(source), SHORT
    )
    record = profile.info.learned["recover"]
    assert record["after"]["loss"] < 0.7 * record["before"]["loss"]
    assert record["after"]["agreement"] > record["before"]["agreement"]


def test_labels_draw_scores_and_labels_to_themselves(tmp_path: Path) -> None:
    given = texts(np.random.default_rng(SEED), 60)
    for kind, labels in (("score", [0.97] * 60), ("regression", [7] * 60), ("labels", [["a", "c"]] * 59 + [None])):
        source = source_of(kind, tmp_path)
        data, losses = data_of(tmp_path, labels, given), []
        for weight in (0.0, 20.0):
            settings = SHORT.model_copy(update={"labels_weight": weight, "steps": 12})
            record = recover(source, recipe(ZeroNeurons()), data, empty_profile(source), settings).info.learned[
                "recover"
            ]
            losses.append(record["before"]["loss"])
        assert losses[1] > losses[0] + 1 and record["after"]["loss"] < 0.8 * losses[1]


def test_labels_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    given, settings = (
        texts(np.random.default_rng(SEED), 20),
        SHORT.model_copy(update={"steps": 1, "labels_weight": 1.0}),
    )
    for kind, label, message in (
        ("score", "good", "'good' is a class"),
        ("score", 3.8, "labels from 3.8 to 3.8, and the model gives 0 to 1"),
        ("regression", ["a"], "is a class"),
        ("labels", 0.5, "is not a list"),
        ("labels", ["d"], "'d' is no class"),
    ):
        source = source_of(kind, tmp_path)
        with pytest.raises(DataError, match=message):
            recover(
                source, recipe(ZeroNeurons()), data_of(tmp_path, [label] * 20, given), empty_profile(source), settings
            )
        ignored = settings.model_copy(update={"labels_weight": 0.0})
        recover(source, recipe(ZeroNeurons()), data_of(tmp_path, [label] * 20, given), empty_profile(source), ignored)


def test_topk_trains_classifiers_of_one_class_alone(tmp_path: Path) -> None:
    from heads import pair_tokenizer

    from trimtab.training.run import train

    folder = tmp_path / "model"
    head_model("bert", SEED, num_labels=1).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    given = texts(np.random.default_rng(SEED), 30)
    data = data_of(tmp_path, [0.5] * 30, given)
    plan = recipe(ZeroNeurons()).model_validate({"passes": [{"ffn-topk": {"density": 0.5, "block": 8}}]})
    with pytest.raises(ModelError, match="gives it a score"):
        train("topk", folder, data, tmp_path / "out", recipe=plan, settings={"steps": 1})


def test_the_divergence_of_sigmoids_by_its_definition() -> None:
    rng = np.random.default_rng(SEED)
    s, t = rng.normal(0, 3, (2, 7, 4))
    p, q = expit(t / 2), expit(s / 2)
    wanted = 4 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1)
    np.testing.assert_allclose(binary_divergence(torch.tensor(s), torch.tensor(t), 2.0), wanted, rtol=1e-4, atol=1e-6)
    far = torch.tensor([[200.0, -200.0]])
    assert torch.isfinite(binary_divergence(-far, far, 1.0)).all()
    objective = Objective(("logits",), (), (), labels_weight=1.0, activation="sigmoid")
    logits = {"logits": torch.tensor(s)}
    missing = torch.full((7, 4), torch.nan)
    assert float(objective.output_loss(logits, logits, None, missing)) == pytest.approx(0, abs=1e-5)
