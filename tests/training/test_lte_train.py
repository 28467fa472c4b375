"""Training of routers, from a folder to a folder: what is written, what goes on after a kill, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo

from trimtab.compiler.profile_choice import choose_profile
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.export import load_model
from trimtab.passes import PassContext, run_passes
from trimtab.passes.errors import DataError, ModelError, RecipeError, TrimtabError
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.training.lte import learn
from trimtab.training.lte.routed import Routed
from trimtab.training.run import train

QUICK: dict[str, Any] = {
    "steps": 24, "group": 4, "lr": 1e-3, "batch_size": 16, "max_tokens": 16, "layer_tokens": 512, "layerwise": 1.0,
    "soft": 1.0, "hard": 1.0, "minutes": 600.0,
}  # fmt: skip
ONLY = {"layerwise": 0, "soft": 0, "hard": 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose next word hangs on the last two, labelled by their first word."""
    path, rng, lines = tmp_path_factory.mktemp("texts") / "texts.jsonl", np.random.default_rng(3), []
    for _ in range(300):
        words = list(rng.integers(0, 30, 2))
        for _ in range(14):
            words.append((words[-1] + 3 * words[-2]) % 31)
        lines.append(json.dumps({"text": " ".join(f"w{word + 4}" for word in words), "label": int(words[0] % 3)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """What each run learned, without the export that a Profile of it takes."""
    results: list[dict[str, np.ndarray]] = []

    def write(routed: Routed, checkpoint: Any, record: dict[str, Any], job: Any, out: Path) -> None:
        weights = {name: value.numpy().copy() for name, value in routed.model.state_dict().items()}
        results.append(weights | routed.routing.tensors())

    monkeypatch.setattr(learn, "write_result", write)
    return results


def test_a_new_model_with_its_routers(texts: Path, tmp_path: Path) -> None:
    folder, stages = zoo.save_pretrained("llama", tmp_path / "model"), set()
    trained = train(
        "lte", folder, texts, tmp_path / "new", settings=QUICK | {"steps": 60},
        recipe={"passes": [], "calibration": {"samples": 16, "states": 32}},
        progress=lambda what, done, total: stages.add(what),
    )  # fmt: skip
    assert trained is not None
    record = trained.record
    assert list(record["stages"]) == ["layerwise", "soft", "hard"] and stages >= {
        "FFN by FFN",
        "soft mask",
        "hard mask",
    }
    assert abs(record["sparsity"] - 0.5) <= 0.02 and record["reached"], record["sparsity"]
    assert np.mean(record["density"]) == pytest.approx(1 - record["sparsity"])
    assert record["history"][0]["stage"] == "before" and record["history"][0]["sparsity"] == 0
    assert len(next(row for row in record["history"] if row["stage"] == "layerwise")["errors"]) == 2
    assert all(row["eta"] > 0 for row in record["history"] if row["stage"] == "soft")
    assert record["perplexity"] == pytest.approx(np.exp(record["loss"]))
    profile = Profile.load(tmp_path / "new" / "profile.safetensors")
    profile.check(open_source(tmp_path / "new").fingerprint)
    learned = profile.learned("lte")
    shapes = {name: value.shape for name, value in learned.items()}
    assert shapes == {"threshold": (1,)} | {
        f"router.{layer}.{name}": shape for layer in (0, 1) for name, shape in (("weight", (27, 64)), ("bias", (27,)))
    }
    assert all(value.dtype == np.float32 for value in learned.values()) and learned["threshold"][0] == 0.5
    assert profile.info.learned["lte"]["settings"]["sparsity"] == 0.5
    assert json.loads((tmp_path / "new" / "lte.json").read_text())["steps"] == record["steps"]
    before, after = (load_model(each, "LlamaForCausalLM") for each in (folder, tmp_path / "new"))
    assert before.lm_head.weight.shape == after.lm_head.weight.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]


def test_copies_learn_the_rate_at_which_neurons_are_computed(texts: Path, tmp_path: Path) -> None:
    """And are compiled with it: the engine computes what was asked for."""
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    settings = QUICK | {"router": "copy", "group": 1, "sparsity": 0.6, "soft": 0.0, "steps": 40}
    trained = train(
        "lte", folder, texts, tmp_path / "new", settings=settings,
        recipe={"passes": [], "calibration": {"samples": 16, "states": 64}},
    )  # fmt: skip
    assert trained is not None
    assert abs(trained.record["sparsity"] - 0.6) <= 0.02 and trained.record["reached"], trained.record["sparsity"]
    history = {row["stage"]: row for row in trained.record["history"]}
    assert history["hard"]["loss"] < 1.1 * history["before"]["loss"]
    learned = Profile.load(tmp_path / "new" / "profile.safetensors").learned("lte")
    assert {name: value.shape for name, value in learned.items() if name != "threshold"} == {
        f"router.{layer}.sizes": (108, 1) for layer in (0, 1)
    }
    graph = open_source(tmp_path / "new").graph()
    context = PassContext(Profile.load(tmp_path / "new" / "profile.safetensors"))
    (result,) = run_passes(graph, [FFNRoute()], context)
    densities = [row["density"] for row in result.details["layers"]]
    assert len(densities) == 2 and abs(np.mean(densities) - 0.4) < 0.05


@pytest.mark.parametrize("select", ["threshold", "cumulative"])
def test_a_classifier_reaches_its_sparsity(select: str, texts: Path, tmp_path: Path, kept: list[Any]) -> None:
    folder = zoo.save_pretrained("bert", tmp_path / "model")
    settings = QUICK | {"sparsity": 0.8, "select": select, "steps": 48}
    trained = train("lte", folder, texts, tmp_path / "new", settings=settings)
    assert trained is not None and 0 <= trained.record["accuracy"] <= 1
    # of 15 held-out texts, of which one may differ
    assert abs(trained.record["sparsity"] - 0.8) <= 0.05
    assert ("cumulative" in kept[0]) == (select == "cumulative") == ("threshold" not in kept[0])


def test_the_dense_model_alone_stays_the_same_function(texts: Path, tmp_path: Path, kept: list[Any]) -> None:
    folder = zoo.save_pretrained("gpt2", tmp_path / "model")
    settings = QUICK | ONLY | {"fine_tune": 1.0, "lr": 0.0, "steps": 2}
    trained = train("lte", folder, texts, tmp_path / "new", settings=settings)
    assert trained is not None and list(trained.record["stages"]) == ["fine_tune"]
    first, *_, last = trained.record["history"]
    assert last["loss"] == pytest.approx(first["loss"], rel=1e-5) and last["sparsity"] == 0
    assert not np.array_equal(
        kept[0]["transformer.h.0.mlp.c_fc.weight"], zoo.tiny_model("gpt2").transformer.h[0].mlp.c_fc.weight.detach()
    )


def test_layerwise_training_brings_outputs_nearer(texts: Path, tmp_path: Path, kept: list[Any]) -> None:
    folder, errors = zoo.save_pretrained("llama", tmp_path / "model"), []
    for steps in (0, 150):
        settings = QUICK | ONLY | {"layerwise": 1.0, "layer_lr": 2e-3, "steps": steps}
        trained = train("lte", folder, texts, tmp_path / "new", settings=settings)
        assert trained is not None
        errors.append(trained.record["errors"])
        assert abs(trained.record["sparsity"] - 0.5) < 0.05  # routers tell groups apart before the first step
    assert (np.array(errors[1]) < 0.7 * np.array(errors[0])).all() and (np.array(errors[0]) < 0.7).all()


class KilledError(Exception):
    """Ends a run where a kill would."""


def test_a_killed_run_goes_on_where_it_was(texts: Path, tmp_path: Path, kept: list[dict[str, np.ndarray]]) -> None:
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    settings = QUICK | {"steps": 36}

    def run(out: str, at: tuple[str, int] | None = None) -> list[Any]:
        seen: list[Any] = []

        def progress(what: str, done: int, total: int) -> None:
            seen.append((what, done))
            if at is not None and what == at[0] and done >= at[1]:
                raise KilledError

        train("lte", folder, texts, tmp_path / out, settings=settings, progress=progress)
        return seen

    run("whole")
    for at in (("group neurons", 1), ("FFN by FFN", 130), ("soft mask", 7), ("hard mask", 9)):
        with pytest.raises(KilledError):
            run("parts", at)
        assert (tmp_path / ".parts.training").is_dir() and not (tmp_path / "parts").exists()
    assert {what for what, _ in run("parts")} == {"group neurons", "hard mask"}
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        np.testing.assert_allclose(kept[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert not list(tmp_path.glob(".*"))


def test_a_sparsity_that_is_missed_is_told(
    texts: Path, tmp_path: Path, kept: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Routers that say the same of all texts, since they have learned nothing, switch all groups at once."""
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    settings = QUICK | ONLY | {"soft": 1.0, "router_lr": 0.0, "steps": 1}
    trained = train("lte", folder, texts, tmp_path / "new", settings=settings)
    assert trained is not None and not trained.record["reached"]
    assert "best reached, at a loss of" in caplog.text and "50.0% asked for: the best reached" in trained.summary


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"settings": {"group": 32}}, RecipeError, "groups of 32 do not divide the 108 neurons of layer 0 FFN"),
        ({"settings": {"group": 27, "sparsity": 0.9}}, RecipeError, "90.0% cannot be reached: .* 75.0% at most"),
        ({"settings": {"sparsity": 1.0}}, RecipeError, "sparsity: should be less than 1"),
        ({"settings": ONLY}, RecipeError, "no stage is left to run"),
        ({"settings": ONLY | {"hard": 1.0}}, RecipeError, "hard needs routers"),
        *(
            ({"settings": {"router": "copy"} | change}, RecipeError, says)
            for change, says in (
                ({"select": "cumulative"}, "select: routers that are copies .* select threshold alone"),
                ({"masks": "scores"}, "masks: routers that are copies"),
                ({"lora_rank": 4}, "lora_rank: routers that are copies"),
                ({"layerwise": 0}, "layerwise: routers that are copies get their density there"),
            )
        ),
        ({"family": "gpt2", "settings": {"router": "copy"}}, ModelError, "reads 40 features"),
        ({"family": "distilbert"}, ModelError, "DistilBertModel has no loss to learn from"),
        ({"lines": ["w5 w6 w7", "w8 w9"]}, DataError, "too little text for blocks of 16 tokens"),
        ({"lines": ["w5 w6 w7"]}, DataError, "1 sample"),
        ({"lines": ["w5 w6 w7 w8 w9"] * 8, "settings": {"max_tokens": 4}}, DataError, "too few for routers"),
        ({"family": "bert", "lines": ["w5 w6 w7", "w8 w9"]}, DataError, "text 1 has no label"),
        ({"settings": {"lr": 1e30, "layerwise": 0}}, TrimtabError, "use a smaller --lr"),
        ({"settings": {"layer_lr": 1e30}}, TrimtabError, "use a smaller --layer-lr"),
        ({"profile": True}, RecipeError, "takes no Profile"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said(
    change: dict[str, Any], kind: type[TrimtabError], says: str, texts: Path, tmp_path: Path, kept: list[Any]
) -> None:
    folder, data = zoo.save_pretrained(change.get("family", "llama"), tmp_path / "model"), texts
    if "lines" in change:
        data = tmp_path / "lines.txt"
        data.write_text("\n".join(change["lines"]))
    with pytest.raises(kind, match=says):
        train(
            "lte", folder, data, tmp_path / "new", settings=QUICK | change.get("settings", {}),
            profile="p.safetensors" if "profile" in change else None,
        )  # fmt: skip
    assert not (tmp_path / "new").exists() and not kept


def test_a_routed_model_compiled_without_its_routers_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = ProfileInfo(model="m", data="d", samples=1, tokens=1, learned={"lte": {"routers": True}})
    Profile(info, {"head.states": np.ones((1, 1), np.float32)}).save(tmp_path / "profile.safetensors")
    choose_profile(None, tmp_path, load_recipe({"passes": ["dynamic-int8"]}), data=True)
    assert "add `ffn-route` to the recipe" in caplog.text
    caplog.clear()
    (tmp_path / "lte.json").write_text('{"routers": true}')
    (tmp_path / "profile.safetensors").unlink()
    choose_profile(None, tmp_path, load_recipe({"passes": ["dynamic-int8"]}), data=True)
    assert "put its profile.safetensors back" in caplog.text
    caplog.clear()
    choose_profile(None, tmp_path, load_recipe({"passes": ["ffn-route"]}), data=True)
    assert not caplog.text  # `compile` refuses it, with the command that learns routers


def test_neurons_that_are_needed_together_come_into_one_group(texts: Path, tmp_path: Path, kept: list[Any]) -> None:
    """Of one token's needed neurons, groups by need hold more at once than groups in the order of the model do."""
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    weights = []
    for by in ("need", "weights"):
        train("lte", folder, texts, tmp_path / "new", settings=QUICK | {"steps": 0, "group_by": by})
        weights.append(kept[-1]["model.layers.0.mlp.down_proj.weight"])
    assert not np.array_equal(*weights)
    np.testing.assert_array_equal(*(np.sort(each, axis=1) for each in weights))  # the same neurons


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_launchers_that_shard_weights_are_refused(
    name: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    folder = zoo.save_pretrained("llama", tmp_path / "model")
    with pytest.raises(TrimtabError, match="its stages hand on whole weights"):
        train("lte", folder, texts, tmp_path / "new", settings=QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
