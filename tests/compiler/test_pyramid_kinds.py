"""token-prune and early-exit on other kinds of models than classifiers of texts, beside torch that removes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import heads
import numpy as np
import pytest
import torch
import zoo
from packed_encoder import exit_weights, stays

from trimtab.compiler import compile_model, load
from trimtab.compiler.sources import open_source
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import PassError
from trimtab.passes.graph import load_graph
from trimtab.passes.profile import Profile, ProfileInfo

CLEAR = 1e-5
"""How far the least important token that stays is from the most important one that goes."""


def seeded() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


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
    import copy

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
    """Random thresholds and exits behind all layers but the last, as training would have learned them."""
    made = {"thresholds": np.array([0, *rng.uniform(0.05, 0.2, layers - 1)], np.float32)}
    for layer in range(layers - 1):
        made |= exit_weights(rng, layer, "light", width, classes)
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
