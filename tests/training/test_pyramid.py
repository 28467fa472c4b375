"""What a pyramid computes while it learns: for tokens that stay, what a model computes that has no others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import EvalPrediction

from trimtab.training.magic_pyramid.encoder import layers_of
from trimtab.training.magic_pyramid.exits import make_exit
from trimtab.training.magic_pyramid.judge import judge
from trimtab.training.magic_pyramid.pruning import Pruning, received, stays_always
from trimtab.training.magic_pyramid.pyramid import Pyramid
from trimtab.training.magic_pyramid.quantiles import fit_thresholds
from trimtab.training.magic_pyramid.settings import Settings

SEED = int(np.random.default_rng().integers(1 << 30))
FAMILIES = {
    "Bert": {}, "Roberta": {"type_vocab_size": 1}, "XLMRoberta": {"type_vocab_size": 1},
    "Electra": {"embedding_size": 12}, "DistilBert": {},
}  # fmt: skip
CLASSES = 3


def tiny(family: str) -> Any:
    """A classifier of random weights, biases and norms included."""
    print(f"seed {SEED}")
    torch.manual_seed(SEED)
    sizes: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
        "max_position_embeddings": 64, "num_labels": CLASSES, "pad_token_id": 0,
    }  # fmt: skip
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    model = kind(kind.config_class(**sizes | FAMILIES[family])).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.double()


def texts(rng: np.random.Generator, batch: int = 6, tokens: int = 17) -> tuple[Tensor, Tensor]:
    """Ids and mask; texts of every length, one of a single token, and padding that holds anything."""
    lengths = rng.permutation([1, tokens, *rng.integers(2, tokens, batch - 2)])
    mask = np.arange(tokens) < lengths[:, None]
    return torch.from_numpy(rng.integers(3, 97, (batch, tokens))), torch.from_numpy(mask.astype(np.int64))


def embedded(model: Any, ids: Tensor) -> Tensor:
    """What enters the first layer, [tokens, width]."""
    states = model.base_model.embeddings(input_ids=ids[None])
    project = getattr(model.base_model, "embeddings_project", None)
    return (project(states) if project is not None else states)[0]


def by_hand(model: Any, ids: Tensor, thresholds: Tensor) -> tuple[list[Tensor], Tensor]:
    """States in front of the first layer and behind each, [kept, width], and logits: tokens that leave are removed."""
    x = embedded(model, ids)
    states = [x]
    for (layer, attention), threshold in zip(layers_of(model), thresholds, strict=True):
        bert = hasattr(attention, "query")
        names = ("query", "key", "value") if bert else ("q_lin", "k_lin", "v_lin")
        q, k, v = (getattr(attention, name)(x).unflatten(-1, (4, -1)).transpose(0, 1) for name in names)
        weights = (q @ k.transpose(1, 2) / np.sqrt(q.shape[-1])).softmax(-1)
        context = (weights @ v).transpose(0, 1).flatten(1)
        importance = weights.mean((0, 1))
        keep = importance >= threshold if threshold > 0 else torch.ones(len(x), dtype=torch.bool)
        keep[0] = True
        if len(x) > 1:
            keep[1 + importance[1:].argmax()] = True
        if bert:
            x = layer.attention.output(context, x)[keep]
            x = layer.output(layer.intermediate(x), x)
        else:
            x = layer.sa_layer_norm(attention.out_lin(context) + x)[keep]
            x = layer.output_layer_norm(layer.ffn(x) + x)
        states.append(x)
    pooler = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        logits = model.classifier(pooler(x[None]))
    elif hasattr(model, "pre_classifier"):
        logits = model.classifier(model.pre_classifier(x[:1]).relu())
    else:
        logits = model.classifier(x[None])
    return states, logits[0]


def pyramid_of(model: Any, thresholds: Tensor, **settings: Any) -> Pyramid:
    pyramid = Pyramid(model, Settings(**settings), mean_tokens=9.0).double()
    pyramid.pruning.multiples.data = thresholds * 9
    pyramid.enter("hard", pruned=True)
    return pyramid.eval()


def some_thresholds(rng: np.random.Generator) -> Tensor:
    """Around the mean importance of texts of some ten tokens; those of one layer prune nothing."""
    thresholds = torch.from_numpy(rng.uniform(0.07, 0.2, 3))
    thresholds[int(rng.integers(3))] = float(rng.choice([0.0, -1.0]))
    return thresholds


@pytest.mark.parametrize("head", ["light", "first", "fastbert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hiding_tokens_is_removing_them(family: str, head: str) -> None:
    rng, model = np.random.default_rng(SEED), tiny(family)
    thresholds, (ids, mask) = some_thresholds(rng), texts(rng)
    lengths = mask.sum(-1)
    with torch.no_grad():
        wanted = [by_hand(model, row[:length], thresholds) for row, length in zip(ids, lengths, strict=True)]
        pyramid = pyramid_of(model, thresholds, head=head)
        found = pyramid(ids, mask, torch.zeros(len(ids), dtype=torch.int64))
        exits = [
            [
                leave(x[None], torch.ones(1, len(x)))[0]
                for leave, x in zip(pyramid.exits.values(), states[:-1], strict=True)
            ]
            for states, _ in wanted
        ]
    stay = torch.tensor([[len(x) for x in states[1:]] for states, _ in wanted])
    assert torch.equal(found["stay"].long(), stay)
    assert (stay[:, -1] < lengths).any()
    np.testing.assert_allclose(found["logits"], torch.stack([logits for _, logits in wanted]), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found["exits"], torch.stack([torch.stack(row) for row in exits]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_of_nothing_are_the_dense_model(family: str) -> None:
    rng, model = np.random.default_rng(SEED), tiny(family)
    ids, mask = texts(rng)
    with torch.no_grad():
        dense = model(input_ids=ids, attention_mask=mask).logits
        found = pyramid_of(model, torch.zeros(3))(ids, mask, torch.zeros(len(ids), dtype=torch.int64))
    np.testing.assert_allclose(found["logits"], dense, rtol=1e-9, atol=1e-9)
    assert torch.equal(found["stay"], mask.sum(-1, keepdim=True).expand(-1, 3).float())


def test_a_soft_mask_of_no_temperature_is_the_hard_one() -> None:
    rng, model = np.random.default_rng(SEED), tiny("Bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    thresholds, (ids, mask) = some_thresholds(rng).clamp_min(1e-9), texts(rng)
    pyramid = pyramid_of(model, thresholds, sharpness=1e-9, distil=0.0, pressure=0.0)
    hard = pyramid.train()(ids, mask, torch.ones(len(ids), dtype=torch.int64))["loss"]
    pyramid.enter("soft", pruned=True)
    soft = pyramid.train()(ids, mask, torch.ones(len(ids), dtype=torch.int64))["loss"]
    assert soft.item() == pytest.approx(hard.item(), rel=1e-5)


@pytest.mark.parametrize("mask_of", ["attention", "output"])
def test_pressure_raises_thresholds_until_enough_have_left(mask_of: str) -> None:
    ids, mask = texts(np.random.default_rng(SEED))
    pulled, losses = [], []
    for change in ({"pressure": 0.0}, {"pressure": 3.0}, {"pressure": 3.0, "keep": 1.0}):
        settings = Settings.model_validate({"mask": mask_of, "distil": 0.0, "sharpness": 0.5, "start": 1.0} | change)
        pyramid = Pyramid(tiny("DistilBert"), settings, 9.0).double()
        pyramid.enter("soft", pruned=True)
        torch.manual_seed(SEED)
        loss = pyramid.train()(ids, mask, torch.ones(len(ids), dtype=torch.int64))["loss"]
        loss.backward()
        assert pyramid.pruning.multiples.grad is not None
        pulled.append(float(pyramid.pruning.multiples.grad[-1]))
        losses.append(loss.item())
    assert pulled[1] < pulled[0] == pytest.approx(pulled[2])
    assert losses[1] > losses[0] == pytest.approx(losses[2])


@pytest.mark.parametrize("joint", [0.0, 2.0])
def test_stages_teach_what_is_theirs(joint: float) -> None:
    ids, mask = texts(np.random.default_rng(SEED))
    labels = torch.zeros(len(ids), dtype=torch.int64)
    more = ("exits",) if joint else ()
    wanted = {
        "fine_tune": ("model",), "soft": ("model", "pruning", *more), "hard": ("model", *more), "exits": ("exits",),
    }  # fmt: skip
    for stage, parts in wanted.items():
        pyramid = Pyramid(tiny("Bert"), Settings(start=1.0, joint=joint), 9.0).double()
        pyramid.enter(stage, pruned=stage != "fine_tune")
        pyramid.train()(ids, mask, labels)["loss"].backward()
        learned = {name.split(".")[0] for name, value in pyramid.named_parameters() if value.grad is not None}
        assert learned == set(parts)
        grouped = {id(p) for group in pyramid.groups() for p in group["params"]}
        assert grouped == {id(p) for name, p in pyramid.named_parameters() if name.split(".")[0] in parts}
        assert {id(p) for p in pyramid.parameters() if p.requires_grad} == grouped


def test_a_teacher_draws_the_pruned_model_to_its_dense_answers() -> None:
    ids, mask = texts(np.random.default_rng(SEED))
    labels = torch.zeros(len(ids), dtype=torch.int64)
    pyramid = Pyramid(tiny("Bert"), Settings(start=0.0, distil=1.0, joint=0.0), 9.0).double()
    pyramid.teach(Pyramid(tiny("Bert"), Settings(), 9.0).double())
    pyramid.enter("hard", pruned=True)
    for module in pyramid.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert pyramid.train()(ids, mask, labels)["loss"].item() == pytest.approx(0, abs=1e-6)
    single = Pyramid(tiny("Bert"), Settings(distil=1.0), 9.0)
    single.teach(Pyramid(tiny("Bert"), Settings(), 9.0))
    assert {p.dtype for p in single.double()._teacher[0].parameters()} == {torch.float64}
    pyramid.pruning.multiples.data.fill_(2.0)
    assert pyramid.train()(ids, mask, labels)["loss"].item() > 1e-9


def test_a_temperature_makes_probabilities_true() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    true, apart = 2 * rng.standard_normal((4000, CLASSES)), np.array([0.4, 1.0, 3.0])
    labels = (true + rng.gumbel(size=true.shape)).argmax(-1)  # drawn of softmax(true)
    exits = true[:, None, :] * apart[:, None]
    counts = np.ones((4000, 2))
    found = judge(EvalPrediction((true, exits, counts, counts[:, 0]), labels))
    np.testing.assert_allclose(found["temperatures"], apart, rtol=0.15)
    assert found["exits"] == [found["accuracy"]] * 3 and found["kept"] == [1, 1]


def test_rows_close_up_in_order() -> None:
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    pruning = Pruning(2, 5.0, 0.5, 0.1, on_output=False)
    pruning.mode = "hard"
    stay = torch.from_numpy((rng.random((5, 11)) < 0.4).astype(np.float32))
    stay[:, 0] = 1
    pruning.begin(stay)
    states = torch.from_numpy(rng.standard_normal((5, 11, 3)))
    closed = pruning.shrink(states)
    assert closed.shape == (5, int(stay.sum(-1).max()), 3)
    for row in range(5):
        kept = states[row][stay[row] > 0]
        assert torch.equal(closed[row, : len(kept)], kept)
        assert pruning.stay[row].tolist() == [1.0] * len(kept) + [0.0] * (closed.shape[1] - len(kept))
    pruning.mode = "dense"
    pruning.begin(stay)
    assert pruning.shrink(states) is states


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_thresholds_by_quantiles_keep_the_share_that_is_asked_for(family: str) -> None:
    rng, keep = np.random.default_rng(SEED), float(np.random.default_rng(SEED).uniform(0.4, 0.8))
    pyramid = Pyramid(tiny(family), Settings(soft=0, hard=0, keep=keep), 20.0).double().train()
    ids = torch.from_numpy(rng.integers(3, 97, (24, 40)))
    mask = torch.from_numpy((np.arange(40) < rng.integers(20, 41, 24)[:, None]).astype(np.int64))
    feeds = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(24, dtype=torch.int64)}
    fit_thresholds(pyramid, lambda: [{k: v[i : i + 8] for k, v in feeds.items()} for i in (0, 8, 16)], keep)
    assert pyramid.training
    pyramid.eval().enter("exits", pruned=True)
    with torch.no_grad():
        stay = pyramid(**feeds)["stay"].sum(0) / mask.sum()
    assert stay.mean().item() == pytest.approx(keep, abs=0.05)
    np.testing.assert_allclose(stay[1:] / stay[:-1], stay[0].item(), atol=0.1)


def test_importance_by_its_definition() -> None:
    rng = np.random.default_rng(SEED)
    weights, entered = rng.random((2, 3, 5, 5)), (rng.random((2, 5)) < 0.7).astype(float)
    entered[:, 0] = 1
    wanted = np.zeros((2, 5))
    for b in range(2):
        queries = np.flatnonzero(entered[b])
        wanted[b] = weights[b][:, queries].mean((0, 1))
    found = received(torch.from_numpy(weights), torch.from_numpy(entered))
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    always = stays_always(found, torch.from_numpy(entered)).numpy()
    for b in range(2):
        others = [i for i in np.flatnonzero(entered[b]) if i]
        assert always[b, 0]
        assert not others or always[b, max(others, key=lambda i: wanted[b, i])]
        assert always[b].sum() <= 2


def test_an_exit_reads_none_that_left() -> None:
    torch.manual_seed(SEED)
    states, stay = torch.randn(2, 6, 8), torch.tensor([[1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    other = torch.where(stay[..., None] > 0, states, 100.0)
    for kind in ("light", "first", "fastbert"):
        leave = make_exit(kind, 8, 4, CLASSES)
        np.testing.assert_allclose(leave(other, stay).detach(), leave(states, stay).detach(), rtol=1e-4, atol=1e-5)
        assert leave(states, stay).shape == (2, CLASSES)
