"""ALBERT, whose layers share sets of weights, from the checkpoint to the file: what its budgets promise."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from trimtab.compiler import compile_model, from_torch, load
from trimtab.compiler.builds.build import Build

VOCABULARY, TOKENS = 173, 14
LABELS = 48  # the error over few logits may by chance be several times that of the states
WORKLOAD = {"batch": [1, 2, 3], "tokens": [1, 8, TOKENS]}


class Albert:
    """A random model of two steps through two inner layers, its exported form, and a folder for builds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.builds = folder, 0
        self.seed = secrets.randbelow(10**6)
        rng = np.random.default_rng(self.seed)
        width, neurons, activation = (
            rng.choice([48, 64]),
            rng.choice([192, 256]),
            rng.choice(["gelu", "gelu_new", "relu"]),
        )
        config = transformers.AlbertConfig(
            vocab_size=VOCABULARY, embedding_size=32, hidden_size=int(width), intermediate_size=int(neurons),
            num_hidden_layers=2, num_hidden_groups=1, inner_group_num=2, num_attention_heads=4,
            max_position_embeddings=40, num_labels=LABELS, hidden_act=str(activation),
        )  # fmt: skip
        torch.manual_seed(self.seed)
        self.model = transformers.AlbertForSequenceClassification(config).eval()
        for parameter in self.model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        self.ids = rng.integers(3, VOCABULARY, (3, TOKENS))
        example = (torch.from_numpy(self.ids[:2]), torch.ones(2, TOKENS, dtype=torch.int64))
        axes = {0: "batch", 1: "tokens"}
        self.source = from_torch(
            _Logits(self.model), example, dynamic_shapes=(axes, axes), input_names=["input_ids", "attention_mask"]
        )
        self.matrices = 2 * 2 * int(width * neurons)  # two sets of FFN weights, of four FFNs
        ids = rng.integers(3, VOCABULARY, (40, TOKENS))
        np.savez(folder / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def compiled(self, *passes: Any) -> Build:
        self.builds += 1
        recipe = {"passes": list(passes), "workload": WORKLOAD, "calibration": {"samples": 24, "states": 200}}
        return compile_model(self.source, recipe, self.folder / f"build{self.builds}", data=self.folder / "data.npz")

    def error(self, build: Build) -> float:
        """Relative error of the logits against torch."""
        mask = np.ones_like(self.ids)
        got = next(iter(load(build.path).run({"input_ids": self.ids, "attention_mask": mask}).values()))
        with torch.no_grad():
            want = self.model(torch.from_numpy(self.ids), torch.from_numpy(mask)).logits.numpy()
        return float(np.linalg.norm(got - want) / np.linalg.norm(want))


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask).logits
        return logits


def stored(build: Build) -> int:
    return sum(path.stat().st_size for path in (build.path / "model").iterdir())


@pytest.fixture(scope="module")
def albert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Albert]:
    found = Albert(tmp_path_factory.mktemp("albert"))
    print("seed", found.seed)
    yield found


@pytest.fixture(scope="module")
def dense(albert: Albert) -> Build:
    return albert.compiled()


def test_the_dense_build_is_no_larger_than_the_checkpoint(albert: Albert, dense: Build) -> None:
    assert dense.manifest.sizes.dense_bytes < 1.01 * 4 * albert.parameters
    assert stored(dense) < 1.2 * 4 * albert.parameters + 30_000  # nodes, and rooms between tensors
    assert albert.error(dense) < 1e-5
    sizes = dense.manifest.sizes
    assert 4 * albert.matrices < sizes.dense_ffn_bytes < 1.05 * 4 * albert.matrices
    assert sizes.dense_ffn_bytes == sizes.compiled_ffn_bytes < sizes.dense_bytes


@pytest.mark.parametrize(
    "step",
    [
        {"ffn-split": {"heavy": 1.0}},
        {"ffn-split": {"heavy": 0.5, "rest_form": "fp32"}},
        {"ffn-topk": {"density": 1.0, "most": 1.0, "dense_above": 0}},
    ],
    ids=str,
)
def test_exact_ends_are_exact_and_no_larger(albert: Albert, dense: Build, step: dict[str, Any]) -> None:
    build = albert.compiled(step)
    assert albert.error(build) < 1e-4
    (report,) = build.manifest.passes
    assert report.changed == 4 and not report.left
    assert build.manifest.sizes.compiled_bytes < 1.01 * dense.manifest.sizes.dense_bytes
    assert stored(build) < stored(dense) + 0.2 * 4 * albert.matrices


@pytest.mark.parametrize("size", [0.4, 0.15])
def test_a_budget_of_size_holds_on_disk(albert: Albert, dense: Build, size: float) -> None:
    build = albert.compiled({"ffn-split": {"budget": {"size": size}}})
    sizes = build.manifest.sizes
    assert sizes.compiled_ffn_bytes is not None and sizes.compiled_ffn_bytes <= size * sizes.dense_ffn_bytes
    assert sizes.dense_bytes - sizes.compiled_bytes == pytest.approx(
        sizes.dense_ffn_bytes - sizes.compiled_ffn_bytes, rel=0.02
    )
    assert stored(build) < stored(dense) - 0.8 * (1 - size) * sizes.dense_ffn_bytes
    assert albert.error(build) < 1


def test_a_budget_of_time_counts_every_use(albert: Albert) -> None:
    build = albert.compiled({"ffn-split": {"budget": {"time": 0.4}}}, "dynamic-int8")
    rows = build.manifest.passes[0].details["layers"]
    assert sum(row["macs"] for row in rows) <= 0.4 * 2 * albert.matrices  # each set in two layers
    int8 = build.manifest.passes[1]
    assert int8.changed == 4 * 4 + 4 * 2 + 3
    assert not int8.left and int8.details["float_products"] == 4  # attention has no weights of its own
    assert stored(build) < 0.5 * 4 * albert.parameters and albert.error(build) < 1


def test_integers_are_stored_once(albert: Albert, dense: Build) -> None:
    for bits, share in ((8, 0.32), (4, 0.2)):
        build = albert.compiled({"weight-only": {"bits": bits, "block": 16 if bits == 8 else 32}})
        sizes = build.manifest.sizes
        assert build.manifest.passes[0].changed == 4 * 6 + 2  # all but the embeddings' own projection
        assert sizes.compiled_ffn_bytes is not None
        assert 0.1 * sizes.dense_ffn_bytes < sizes.compiled_ffn_bytes < (share + 0.2) * sizes.dense_ffn_bytes
        assert sizes.compiled_bytes < 0.6 * sizes.dense_bytes
        assert albert.error(build) < (0.1 if bits == 8 else 0.6)


def test_sizes_of_ffns_are_not_told_where_a_later_pass_changes_them(albert: Albert) -> None:
    build = albert.compiled({"ffn-split": {"heavy": 1.0}}, "precision")
    assert build.manifest.sizes.compiled_ffn_bytes is None
    assert build.manifest.sizes.compiled_bytes < 0.6 * build.manifest.sizes.dense_bytes
