"""token-prune and early-exit on other kinds of models than classifiers of texts, beside torch that removes tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import heads
import numpy as np
import pytest
import torch
import zoo
from packed_encoder import exit_logits, exit_weights, stays
from scipy.special import softmax
from scipy.stats import entropy
from seeds import seeded

from trimtab.compiler import compile_model, load
from trimtab.compiler.engine import Engine
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.pooling import Pooling
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import ModelError, PassError
from trimtab.passes.graph import load_graph
from trimtab.passes.profile import Profile, ProfileInfo

CLEAR = 1e-5
"""How far the least important token that stays is from the most important one that goes."""


def vit_states(model: Any, pixels: np.ndarray, shares: list[float]) -> tuple[list[torch.Tensor], float]:
    """Behind each layer of a ViT, of one image and in float64, with the tokens that `shares` lets stay.

    Returns:
        the states, [tokens, width] each; and how clear the closest choice was.
    """
    vit, heads, clear = model.vit, model.config.num_attention_heads, np.inf
    x = vit.embeddings(torch.from_numpy(pixels[None]).double())[0]
    found = []
    for layer, share in zip(vit.layers, shares, strict=True):
        normed = layer.layernorm_before(x)
        own = layer.attention
        q, k, v = (p(normed).reshape(len(x), heads, -1).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
        context = (weights @ v).transpose(0, 1).reshape(len(x), -1)
        kept, gap = stays(weights.mean((0, 1)).numpy(), share, ratio=True)
        clear = min(clear, gap)
        x = x[kept] + own.o_proj(context[kept])
        x = x + layer.mlp(layer.layernorm_after(x))
        found.append(x)
    return found, clear


def vit_logits(model: Any, x: torch.Tensor) -> np.ndarray:
    logits: np.ndarray = model.classifier(model.vit.layernorm(x)[0]).numpy()
    return logits


@torch.no_grad()
def test_images(tmp_path: Path) -> None:
    """Without a mask and without padding, and yet of another number of tokens for each sample."""
    rng = seeded()
    model = copy.deepcopy(zoo.tiny_model("vit")).double()
    keep = [float(share) for share in rng.uniform(0.3, 0.9, 2)]
    passes = ["unpad", {"token-prune": {"keep": keep}}]
    recipe = {"passes": passes, "workload": {"batch": [1, 2, 4]}, "threads": 1}
    engine = load(compile_model(zoo.exported("vit"), recipe, tmp_path / "build").path)
    pixels = zoo.feeds("vit", 6, 0, rng)["pixel_values"]
    dense = model(torch.from_numpy(pixels).double()).logits.numpy()
    np.testing.assert_allclose(engine.run({"pixel_values": pixels}, speed=0)["logits"], dense, rtol=1e-4, atol=1e-4)
    dials = rng.choice([0.0, 0.5, 1.0], 6)
    told = [
        vit_states(model, image, [1 - (1 - share) * dial for share in keep])
        for image, dial in zip(pixels, dials, strict=True)
    ]
    rows = [i for i, (_, clear) in enumerate(told) if clear > CLEAR]
    for some in (rows, rows[:1], rows[1:3], []):
        wanted = np.array([vit_logits(model, told[i][0][-1]) for i in some]).reshape(-1, 7)
        logits = engine.run({"pixel_values": pixels[some]}, dials={"prune": dials[some]})["logits"]
        np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3)


def learned(path: Path, rng: np.random.Generator, width: int = 32, classes: int = 3, layers: int = 2) -> Profile:
    """Random thresholds, and exits in front of each layer, as training would have learned them."""
    made = {"thresholds": np.array([0, *rng.uniform(0.05, 0.2, layers - 1)], np.float32)}
    for after in range(layers):
        made |= exit_weights(rng, after, "light", width, classes)
    info = ProfileInfo(model=open_source(path).fingerprint, data="d", samples=1, tokens=1)
    return Profile(info, {f"learned.magic-pyramid.{name}": value for name, value in made.items()})


def text_model(folder: Path, seed: int, kind: str, **config: Any) -> Path:
    """An ONNX file of a tiny BERT of `kind` ("TokenClassification" and the like), with its config and tokenizer."""
    model = heads.head_model("bert", seed, kind=kind, num_labels=2 if "Question" in kind else 3, **config)
    return heads.save_onnx(model, folder, outputs=("start_logits", "end_logits") if "Question" in kind else ("logits",))


@pytest.mark.parametrize("kind", ["TokenClassification", "QuestionAnswering"])
def test_answers_for_each_token(kind: str, tmp_path: Path) -> None:
    """unpad alone works, and the build still knows what its outputs are; the others are refused with the reason."""
    rng = seeded()
    path = text_model(tmp_path / "model", 1, kind)
    workload = {"batch": [1, 2, 4], "tokens": [1, 8, 24]}
    build = compile_model(path, {"passes": ["unpad"], "workload": workload, "threads": 1}, tmp_path / "build")
    dense = OnnxRuntimeRunner(path)
    engine = load(build.path)
    assert [tensor.shape for tensor in engine.outputs] == [tuple(tensor.shape) for tensor in load_graph(path).outputs]
    kinds = {"TokenClassification": "tokens", "QuestionAnswering": None}
    assert (build.manifest.task.kind if build.manifest.task is not None else None) == kinds[kind]
    assert all(error.max_abs is not None and error.max_abs < 1e-5 for error in build.manifest.check.outputs)
    feeds = heads.feeds(rng, 4, 20)
    real = feeds["attention_mask"] > 0
    for name, wanted in dense.run(feeds).items():
        np.testing.assert_allclose(engine.run(feeds)[name][real], wanted[real], rtol=1e-4, atol=1e-4)
    for step, profile in (({"token-prune": {"keep": [0.5]}}, None), ("early-exit", learned(path, rng))):
        with pytest.raises(PassError) as error:
            compile_model(path, {"passes": ["unpad", step]}, tmp_path / "refused", profile=profile)
        assert "for each token" in f"{error.value.message} {error.value.hint}" or "start_logits" in error.value.message
        assert not (tmp_path / "refused").exists()


FAMILIES = ("electra", "distilbert", "mpnet", "vit")


def classifier(family: str, folder: Path, seed: int) -> tuple[Path, Any]:
    """An ONNX file and its torch model in float64."""
    if family == "vit":
        return zoo.exported("vit"), copy.deepcopy(zoo.tiny_model("vit")).double()
    model = heads.head_model(family, seed, num_labels=3)
    return heads.save_onnx(model, folder), model.double()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_exits_of_families(family: str, tmp_path: Path) -> None:
    """Each sample has the answer of the first exit that is sure of it, as torch's states give it."""
    rng = seeded()
    path, model = classifier(family, tmp_path / "model", 2)
    width, classes = (36, 7) if family == "vit" else (32, 3)
    profile = learned(path, rng, width, classes)
    workload = {"batch": [1, 2, 4]} | ({} if family == "vit" else {"tokens": [1, 8, 24]})
    recipe = {"passes": ["unpad", "early-exit"], "workload": workload, "threads": 1}
    engine = load(compile_model(path, recipe, tmp_path / "build", profile=profile).path)
    feeds = zoo.feeds("vit", 6, 0, rng) if family == "vit" else heads.feeds(rng, 6, 20, family)
    given = {name: torch.from_numpy(value) for name, value in feeds.items()}
    made = model(**given | ({"pixel_values": given["pixel_values"].double()} if family == "vit" else {}),
                 output_hidden_states=True)  # fmt: skip
    lengths = feeds["attention_mask"].sum(1) if "attention_mask" in feeds else [made.hidden_states[0].shape[1]] * 6
    weights = {name: value for name, value in profile.learned("magic-pyramid").items() if name != "thresholds"}
    limits = rng.choice([0.0, 0.6, 0.9, 1.0], 6)
    found = engine.run(feeds, dials={"exit_threshold": limits})
    for row, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        states = [state[row, :length].numpy() for state in made.hidden_states[:2]]
        answers = [exit_logits(weights, state, after, "light") for after, state in enumerate(states)]
        doubts = [entropy(softmax(answer)) / np.log(classes) for answer in answers]
        if min(abs(doubt - limit) for doubt in doubts) < 1e-4:
            continue
        ran = next((after for after, doubt in enumerate(doubts) if doubt < limit), 2)
        wanted = made.logits[row].numpy() if ran == 2 else answers[ran]
        assert found["exit_layer"][row] == ran
        np.testing.assert_allclose(found["logits"][row], wanted, rtol=1e-3, atol=1e-3)


def test_rerankers(tmp_path: Path) -> None:
    """Pairs of texts with one logit are pruned; an exit could not be sure of a score, which is the reason given."""
    rng = seeded()
    model = heads.head_model("bert", 3, num_labels=1)
    path = heads.save_onnx(model, tmp_path / "model")
    recipe = {
        "passes": ["unpad", "token-prune"],
        "workload": {"batch": [1, 2, 4], "tokens": [1, 8, heads.TEXT]},
        "threads": 1,
    }
    profile = learned(path, rng)
    engine = load(compile_model(path, recipe, tmp_path / "build", profile=profile).path)
    assert engine.manifest.task is not None and engine.manifest.task.kind == "score"
    pairs = heads.pairs(rng, 6)
    inputs = engine.tokenize(pairs)
    np.testing.assert_allclose(
        engine.run(inputs, speed=0)["logits"], heads.torch_logits(model, pairs), rtol=1e-4, atol=1e-4
    )
    assert_company_changes_nothing(engine, inputs, rng)
    with pytest.raises(ModelError, match="two classes or more, and this model gives a score") as error:
        compile_model(path, {"passes": ["unpad", "early-exit"]}, tmp_path / "refused", profile=profile)
    assert "from the recipe" in str(error.value.hint)


def assert_company_changes_nothing(engine: Engine, inputs: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Samples alone and without padding get what they get in a batch, at speeds of their own; all but one at least."""
    mask = inputs["attention_mask"]
    speeds = rng.uniform(0, 1, len(mask))
    together = engine.run(inputs, speed=speeds)["logits"]
    alike = 0
    for row, length in enumerate(mask.sum(1)):
        own = {name: array[row : row + 1, :length] for name, array in inputs.items()}
        alone = engine.run(own, speed=speeds[row])["logits"]
        alike += np.allclose(alone, together[row : row + 1], rtol=1e-3, atol=1e-3)
    assert alike >= len(mask) - 1  # what a token receives may be at the threshold up to rounding; that is rare


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_pooled_states(mode: str, tmp_path: Path) -> None:
    """A mean, or [CLS] chosen by the mask, is taken of packed tokens: so such a classifier is pruned, too."""
    rng = seeded()
    model = heads.head_model("bert", 4, num_labels=3)
    pooling = Pooling([mode])

    class Pooled(torch.nn.Module):
        config = model.config

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            states = self.model.bert(**inputs).last_hidden_state
            return {"logits": self.model.classifier(pooling(states, inputs["attention_mask"]))}

        def set_attn_implementation(self, name: str) -> None:
            self.model.set_attn_implementation(name)

    Pooled.__name__ = "PooledForSequenceClassification"
    path = heads.save_onnx(Pooled().eval(), tmp_path / "model")
    workload = {"batch": [1, 2, 4], "tokens": [1, 8, 24]}
    passes = ["unpad", "token-prune", "early-exit"]
    build = compile_model(
        path, {"passes": passes, "workload": workload, "threads": 1}, tmp_path / "build", profile=learned(path, rng)
    )
    names = [tensor.name for node in load_graph(build.path / "model/model.onnx").nodes for tensor in node.outputs]
    assert not any("padded" in name for name in names)  # nothing is padded again
    engine = load(build.path)
    feeds = heads.feeds(rng, 8, 20)
    feeds["attention_mask"][0] = 0
    wanted = OnnxRuntimeRunner(path).run(feeds)["logits"]
    exact = engine.run(feeds, speed=0)["logits"]
    np.testing.assert_allclose(exact[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    assert np.isfinite(exact).all()  # a sample without tokens
    some = {name: value[1:] for name, value in feeds.items()}
    assert_company_changes_nothing(engine, some, rng)
    assert engine.run({name: value[:0] for name, value in feeds.items()}, speed=0.5)["logits"].shape == (0, 3)
