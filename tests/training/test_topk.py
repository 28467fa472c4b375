"""Fine-tuning to the top-k: what is kept and learned, and that the compiled model is the one that learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from recovery import onnx_source
from seeds import seeded
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.compiler import compile_model, load
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.open import open_source
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import BuildError, DataError, ModelError, RecipeError, TrimtabError
from trimtab.training.run import train
from trimtab.training.topk.anneal import annealed
from trimtab.training.topk.find import down_projections
from trimtab.training.topk.settings import Settings
from trimtab.training.topk.sparse import SparseFFNs

DOWNS = {
    "bert": "output.dense", "roberta": "output.dense", "distilbert": "ffn.lin2", "vit": "fc2",
    "gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h", "llama": "mlp.down_proj",
    "qwen2": "mlp.down_proj", "gemma": "mlp.down_proj",
}  # fmt: skip
QUICK = Settings(steps=30, lr=3e-3, batch_size=8, max_tokens=16)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose next word hangs on the last two, labelled by their first word."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(3)
    lines = []
    for _ in range(150):
        words = list(rng.integers(0, 30, 2))
        for _ in range(14):
            words.append((words[-1] + 3 * words[-2]) % 31)
        lines.append(json.dumps({"text": " ".join(f"w{word + 4}" for word in words), "label": int(words[0] % 3)}))
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "texts.jsonl"


def finetune(folder: Path, plan: Any, data: Path, settings: Settings, out: Path, **more: Any) -> dict[str, Any]:
    """The record of a fine-tuning by the one way to every method."""
    trained = train("topk", folder, data, out, recipe=plan, settings=settings, **more)
    assert trained is not None
    return trained.record


def recipe(**options: Any) -> Any:
    return load_recipe({"passes": [{"ffn-topk": options}], "threads": 1})


def apart(scores: np.ndarray, k: int) -> bool:
    """Whether the k-th largest score of each row and the next differ by far more than float32 rounds them."""
    order = -np.sort(-scores, -1)
    last, following = order[..., k - 1], order[..., k]
    return bool(((last - following > 1e-4 * order[..., 0]) | (last == 0)).all())


def clear(model: nn.Module, downs: list[nn.Module], ids: np.ndarray, density: float) -> bool:
    """Whether no choice of a sparse model hangs on rounding, so that another way to compute it chooses the same."""
    seen = []

    def look(down: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        weight = (down.weight.T if isinstance(down, nn.Linear) else down.weight).detach().double().numpy()
        scores = np.abs(inputs[0].detach().double().numpy()) * np.linalg.norm(weight, axis=1)
        seen.append(apart(scores, round(density * scores.shape[-1])))

    hooks = [down.register_forward_pre_hook(look, prepend=True) for down in downs]
    with torch.no_grad():
        model(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    assert seen
    return all(seen)


@pytest.mark.parametrize("make", [lambda n, d: nn.Linear(n, d), lambda n, d: Conv1D(d, n)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(("block", "density", "k"), [(1, 0.1, 2), (1, 0.01, 1), (4, 0.4, 2), (1, 0.95, 19)])
def test_keeps_the_blocks_that_add_most(make: Any, block: int, density: float, k: int) -> None:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    down = make(20, 7)
    weight = (down.weight.T if isinstance(down, nn.Linear) else down.weight).detach().double().numpy()
    scores = np.ones((3, 5, 20 // block))
    while not apart(scores, k):  # equal ones would be ranked by their rounding
        h = torch.randn(3, 5, 20, requires_grad=True)
        scores = (np.abs(h.detach().double().numpy()) * np.linalg.norm(weight, axis=1)).reshape(3, 5, -1, block).sum(-1)
    kept = np.repeat(scores >= np.sort(scores, -1)[..., -k, None], block, -1)
    wanted = (h.detach().double().numpy() * kept) @ weight + down.bias.detach().double().numpy()
    ffns = SparseFFNs([down], block)
    ffns.density = density
    y = down(h)
    np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert h.grad is not None
    assert ((h.grad != 0).numpy() == kept).all()
    ffns.density = 1.0
    dense = down(h)
    ffns.remove()
    assert torch.equal(dense, down(h))


@pytest.mark.parametrize("family", DOWNS)
def test_down_projections_are_found_by_their_weights(family: str) -> None:
    model, ffns = zoo.tiny_model(family), find_anatomy(onnx_source(family).graph()).ffns
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(module)] for module in down_projections(model, ffns)]
    assert len(found) == len(set(found)) == len(ffns) >= 2
    assert all(name.endswith(DOWNS[family]) for name in found)
    assert [int(part) for name in found for part in name.split(".") if part.isdigit()] == list(range(len(ffns)))


def test_a_model_of_other_weights_has_no_such_module() -> None:
    model, ffns = zoo.tiny_model("llama"), find_anatomy(onnx_source("llama").graph()).ffns
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        down.weight.mul_(2)
    try:
        with pytest.raises(ModelError, match="layer 1 FFN: no linear module"):
            down_projections(model, ffns)
    finally:
        with torch.no_grad():
            down.weight.div_(2)


def test_density_falls_by_equal_factors() -> None:
    assert annealed(0.0, 0.04, 0.5) == 1
    assert annealed(0.25, 0.04, 0.5) == pytest.approx(0.2)
    assert [annealed(at, 0.04, 0.5) for at in (0.5, 0.8, 1.0)] == [0.04] * 3
    assert annealed(0.0, 0.04, 0.0) == 0.04


@pytest.mark.parametrize(
    "options",
    [
        {"take": 0.25, "predictor": "copy", "signal": "both", "dense_above": 1000},
        {"take": 0.6, "predictor": "copy", "signal": "both", "exact": True, "dense_above": 1000},
        {"take": 0.6, "rank": 4, "exact": True, "dense_above": 0},  # a prompt computes all, and keeps as few
        {"take": 1.0, "exact": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_compiled_with_an_exact_predictor_it_is_the_model_that_learned(
    family: str, options: dict[str, Any], texts: Path, tmp_path: Path
) -> None:
    """torch's top-k in the forward pass is the function that `ffn-topk` approaches."""
    folder = zoo.save_pretrained(family, tmp_path / "model")
    exact = {"density": 0.25, **options}
    plan = {"passes": [{"ffn-topk": exact}], "threads": 1, "workload": {"batch": [1, 1, 2], "tokens": [1, 8, 16]}}
    engine = load(compile_model(folder, plan, tmp_path / "build", data=texts).path)
    source = open_source(folder)
    model = load_model(folder, type(zoo.tiny_model(family)).__name__)
    downs = down_projections(model, find_anatomy(source.graph()).ffns)
    ffns, rng = SparseFFNs(downs), seeded()
    ffns.density = 0.25
    ids = rng.integers(3, 90, (1, 9))
    while not clear(model, downs, ids, ffns.density):
        ids = rng.integers(3, 90, (1, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for tensor in engine.inputs:
        if tensor.name.startswith("past"):
            assert tensor.shape is not None
            shape = [1, *(size if isinstance(size, int) else 0 for size in tensor.shape[1:])]
            feeds[tensor.name] = np.zeros(shape, np.float32)
        elif tensor.name == "position_ids":
            feeds[tensor.name] = np.arange(9)[None]
    found = engine.run({tensor.name: feeds[tensor.name] for tensor in engine.inputs})["logits"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
        ffns.density = 1.0
        dense = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(dense - wanted).max() > 100 * np.abs(found - wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_language_model_learns_to_do_with_few(texts: Path, tmp_path: Path) -> None:
    folder, seen = zoo.save_pretrained("llama", tmp_path / "model"), []
    plan = recipe(density=0.1, most=1.0)
    out = tmp_path / "new"
    record = finetune(
        folder, plan, texts, QUICK, out, progress=lambda what, done, total: seen.append((what, done, total))
    )
    assert record["steps"] == 30
    assert record["losses"]["after"] < 0.95 * record["losses"]["before"]
    assert seen[-1] == ("fine-tune", 30, 30)
    densities = [row["density"] for row in record["history"]]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 0.1 < densities[0]
    assert json.loads((out / "topk.json").read_text())["losses"] == record["losses"]
    build = compile_model(out, plan, tmp_path / "build", data=texts)
    assert build.manifest.passes[0].changed == 2
    before = load_model(folder, "LlamaForCausalLM")
    after = load_model(out, "LlamaForCausalLM")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    again = finetune(folder, plan, texts, QUICK, tmp_path / "again")
    assert again["losses"] == pytest.approx(record["losses"], rel=1e-4)


def test_a_classifier_learns_from_labels(texts: Path, tmp_path: Path) -> None:
    folder = zoo.save_pretrained("bert", tmp_path / "model")
    record = finetune(folder, recipe(density=0.2, block=8), texts, QUICK, tmp_path / "new")
    assert record["losses"]["after"] < record["losses"]["before"]
    assert record["block"] == 8


def test_no_step_changes_no_weight(texts: Path, tmp_path: Path) -> None:
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    settings = QUICK.model_copy(update={"steps": 0})
    assert finetune(folder, recipe(density=0.1, most=1.0), texts, settings, tmp_path / "new")["steps"] == 0
    before, after = (load_model(path, "LlamaForCausalLM").state_dict() for path in (folder, tmp_path / "new"))
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_two_processes_learn_as_one_model(texts: Path, tmp_path: Path) -> None:
    zoo.save_pretrained("llama", tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("passes:\n  - ffn-topk: {density: 0.1}\n", encoding="utf-8")
    words = f"train model recipe.yaml --method topk --data {texts} -o new --lr 3e-3 --batch-size 4 --json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "trimtab.compiler.cli", *words.split(), "--max-tokens", "16"]
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    run = subprocess.run([*command, "--steps", "20"], **options)
    assert run.returncode == 0, run.stderr[-3000:]
    record = json.loads(run.stdout)  # of one process alone
    assert record["losses"]["after"] < record["losses"]["before"]
    assert load_model(tmp_path / "new", "LlamaForCausalLM") is not None
    timed = subprocess.run([*command, "-o", "other"], **options)
    assert "give the length of the run with --steps" in timed.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"plan": {"passes": ["ffn-split"]}}, RecipeError, "no pass 'ffn-topk'"),
        ({"plan": {"passes": [{"ffn-topk": {"block": 5}}]}}, RecipeError, "blocks of 5 do not divide the 108 neurons"),
        ({"folder": "no"}, ModelError, "no Hugging Face directory"),
        ({"family": "distilbert"}, ModelError, "DistilBertModel has no loss to learn from"),
        ({"lines": ["w5 w6 w7", "w8 w9"]}, DataError, "too little text for blocks of 16 tokens"),
        ({"lines": ["w5 w6 w7"]}, DataError, "1 sample"),
        ({"family": "bert", "lines": ["w5 w6 w7", "w8 w9"]}, DataError, "text 1 has no label"),
        ({"out": "taken"}, BuildError, "taken: exists already"),
        ({"settings": Settings(steps=12, lr=1e30)}, TrimtabError, "use a smaller --lr"),
    ],
)
def test_what_cannot_be_learned_is_said(
    change: dict[str, Any], kind: type[TrimtabError], message: str, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    folder = tmp_path / "model"
    zoo.save_pretrained(change.get("family", "llama"), folder)
    data = texts
    if "lines" in change:
        data = tmp_path / "lines.txt"
        data.write_text("\n".join(change["lines"]))
    settings = change.get("settings", Settings(steps=1, max_tokens=16))
    with pytest.raises(kind, match=message):
        finetune(
            tmp_path / change.get("folder", "model"), load_recipe(change.get("plan", {"passes": ["ffn-topk"]})),
            data, settings, tmp_path / change.get("out", "new"),
        )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir() if path != data) == ["model", "taken"]
    assert (tmp_path / "taken" / "note").read_text() == "mine"
