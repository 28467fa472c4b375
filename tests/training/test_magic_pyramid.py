"""Training to a pyramid, from a folder to a folder: what is written, what goes on after a kill, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from heads import head_model, pair_tokenizer
from routes import profile_with, random_routers
from safetensors.numpy import save_file

from trimtab.compiler import compile_model
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.checkpoint import read_checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.folder import class_labels
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import BuildError, DataError, ModelError, RecipeError, TrimtabError
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.training.before import learned_by_others
from trimtab.training.clock import Clock
from trimtab.training.magic_pyramid import learn
from trimtab.training.magic_pyramid.pyramid import Pyramid
from trimtab.training.magic_pyramid.result import learned_tensors, save_tuned
from trimtab.training.magic_pyramid.settings import Settings
from trimtab.training.resume import Unfinished
from trimtab.training.run import train

SEED = 11  # whether a random model learns in a few steps, or diverges, is not what is tested here
QUICK = {"steps": 10, "fine_tune": 1.0, "batch_size": 16, "lr": 1e-3, "max_tokens": 24}


def model(folder: Path, family: str = "bert", **config: Any) -> Path:
    print(f"seed {SEED}")
    head_model(family, SEED, **{"num_labels": 2} | config).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


def data(path: Path, label: Any = None, count: int = 60) -> Path:
    """Texts whose first word tells the class."""
    rng, lines = np.random.default_rng(SEED), []
    for number in range(count):
        words = rng.integers(0, 90, rng.integers(1, 16))
        words[0] = number % 2 + 2 * (words[0] // 2)
        lines.append({"text": " ".join(f"w{i}" for i in words), "label": number % 2 if label is None else label})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """What each run learned; its model goes to kept0, kept1, ..., without the export that a Profile of it takes."""
    results: list[dict[str, np.ndarray]] = []

    def write(pyramid: Pyramid, checkpoint: Any, record: dict[str, Any], job: Any, out: Path) -> None:
        weights = {name: value.numpy().copy() for name, value in pyramid.model.state_dict().items()}
        folder = out.with_name(f"kept{len(results)}")
        folder.mkdir()
        save_tuned(pyramid, checkpoint, record, folder)
        results.append(weights | learned_tensors(pyramid, record))

    monkeypatch.setattr(learn, "write_result", write)
    return results


def test_a_new_model_with_its_profile(tmp_path: Path) -> None:
    folder, seen = model(tmp_path / "model"), []
    trained = train(
        "magic-pyramid", folder, data(tmp_path / "data.jsonl"), tmp_path / "new", settings=QUICK | {"pressure": 5.0},
        recipe={"passes": [], "calibration": {"samples": 16, "states": 32}}, progress=lambda *each: seen.append(each),
    )  # fmt: skip
    assert trained is not None
    record = trained.record
    assert list(record["stages"]) == ["fine_tune", "soft", "hard", "exits"]
    assert sum(record["stages"].values()) == record["steps"] == 10
    assert [row["stage"] for row in record["history"] if row["stage"] == "before"] == ["before"]
    assert {what for what, _, _ in seen} >= {"fine-tune", "soft mask", "hard mask", "exits"}
    assert (len(record["kept"]) == 2 and len(record["exits"]) == 2 and "soft" in trained.summary) or record["kept"]
    profile = Profile.load(tmp_path / "new" / "profile.safetensors")
    profile.check(open_source(tmp_path / "new").fingerprint)
    learned = profile.learned("magic-pyramid")
    assert learned["thresholds"].shape == (2,)
    assert {name for name in learned if name != "thresholds"} == {
        f"exit.{after}.{part}.{kind}"
        for after in (0, 1)
        for part in ("norm", "dense", "out")
        for kind in ("weight", "bias")
    }
    assert profile.info.learned["magic-pyramid"]["settings"]["head"] == "light"
    assert profile.info.samples == 16
    before, after = (load_model(each, "BertForSequenceClassification") for each in (folder, tmp_path / "new"))
    assert not torch.equal(before.classifier.weight, after.classifier.weight)
    assert json.loads((tmp_path / "new" / "magic-pyramid.json").read_text())["steps"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model", "new"]


class KilledError(Exception):
    """Ends a run where a kill would."""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, kept: list[dict[str, np.ndarray]]) -> None:
    folder, texts = model(tmp_path / "model"), data(tmp_path / "data.jsonl")
    stages = {"fine_tune": 1.0, "soft": 1.0, "hard": 1.0, "exits": 1.0}
    settings = QUICK | stages | {"steps": 48, "pressure": 3.0}

    def run(out: str, at: tuple[str, int] | None = None) -> list[Any]:
        seen: list[Any] = []

        def progress(what: str, done: int, total: int) -> None:
            seen.append((what, done))
            if (what, done) == at:
                raise KilledError

        train("magic-pyramid", folder, texts, tmp_path / out, settings=settings, progress=progress)
        return seen

    whole = run("whole")
    for at in (("fine-tune", 7), ("soft mask", 5), ("hard mask", 1), ("exits", 11)):
        with pytest.raises(KilledError):
            run("parts", at)
        assert (tmp_path / ".parts.training").is_dir() and not (tmp_path / "parts").exists()
    rest = run("parts")
    assert len(rest) < 6 < len(whole) == 48
    assert kept[0].keys() == kept[1].keys()
    for name, value in kept[0].items():
        np.testing.assert_allclose(kept[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert not list(tmp_path.glob(".*"))


def test_stages_can_be_left_out(tmp_path: Path, kept: list[dict[str, np.ndarray]]) -> None:
    folder, texts = model(tmp_path / "model", "distilbert"), data(tmp_path / "data.jsonl")
    for change, stages in (
        ({"fine_tune": None, "hard": 0, "exits": 0}, ["soft"]),
        ({"fine_tune": None, "soft": 0, "hard": 0, "head": "fastbert", "entrance": False}, ["exits"]),
        ({"soft": 0, "hard": 0, "exits": 0}, ["fine_tune"]),
        ({"fine_tune": 0, "soft": 0, "hard": 0, "keep": 0.5}, ["exits"]),
        ({"fine_tune": 0, "soft": 0, "exits": 0, "keep": 0.5}, ["hard"]),
    ):
        trained = train("magic-pyramid", folder, texts, tmp_path / "new", settings=QUICK | {"steps": 3} | change)
        assert trained is not None and list(trained.record["stages"]) == stages
        assert ("thresholds" in kept[-1]) == ("soft" in stages or "keep" in change) == ("kept" in trained.record)
        assert ("exit.0.out.bias" in kept[-1]) == ("exits" in stages and "entrance" not in change)
        assert ("exit.1.out.bias" in kept[-1]) == ("exits" in stages) == ("exits" in trained.record)


@pytest.mark.parametrize("length", [{"steps": 0}, {"minutes": 0, "steps": None}], ids=str)
def test_no_step_changes_no_weight(
    length: dict[str, Any], tmp_path: Path, kept: list[dict[str, np.ndarray]], caplog: pytest.LogCaptureFixture
) -> None:
    """No stage trains, and each says so."""
    folder, texts = model(tmp_path / "model"), data(tmp_path / "data.jsonl")
    trained = train("magic-pyramid", folder, texts, tmp_path / "new", settings=QUICK | {"fine_tune": 0} | length)
    assert trained is not None and trained.record["steps"] == 0
    assert trained.record["stages"] == {"soft": 0, "hard": 0, "exits": 0}
    before = load_model(folder, "BertForSequenceClassification").state_dict()
    for name, value in before.items():
        np.testing.assert_array_equal(kept[0][name], value.numpy(), err_msg=name)
    assert [each.args[0] for each in caplog.records if "ran no step" in each.message] == [
        "soft mask", "hard mask", "exits",
    ]  # fmt: skip


def test_a_pyramid_learns_more(tmp_path: Path) -> None:
    folder, texts = model(tmp_path / "model"), data(tmp_path / "data.jsonl")
    recipe = {"passes": [], "calibration": {"samples": 16, "states": 32}}
    learned = []
    for place, change in (("first", {}), ("second", {"soft": 0, "hard": 1e-6, "lr": 0.0, "exit_lr": 0.0})):
        settings = QUICK | {"fine_tune": 0} | change
        train("magic-pyramid", folder, texts, tmp_path / place, settings=settings, recipe=recipe)
        folder = tmp_path / place
        learned.append(Profile.load(folder / "profile.safetensors").learned("magic-pyramid"))
    assert learned[0].keys() == learned[1].keys()
    for name, value in learned[0].items():
        if ".out." not in name:  # its temperature is fitted again
            np.testing.assert_allclose(learned[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("router", ["linear", "copy"])
def test_a_routed_model_keeps_its_routers(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are at work while exits learn, go along in the Profile, and are told of once the weights have changed."""
    folder, texts = model(tmp_path / "model"), data(tmp_path / "data.jsonl")
    source = open_source(folder)
    routers = random_routers(source.graph(), np.random.default_rng(SEED))
    if router == "copy":
        routers = {"threshold": routers["threshold"]} | {
            f"router.{ffn.layer}.sizes": np.full((ffn.d_ff, 1), 9, np.float32)
            for ffn in find_anatomy(source.graph()).ffns
        }
    profile = profile_with(routers)
    record: dict[str, Any] = {"lte": {"routers": True}, "recover": {}}
    profile.info = profile.info.model_copy(update={"model": source.fingerprint, "learned": record})
    profile.tensors["learned.recover.w"] = np.zeros(1, np.float32)
    profile.save(folder / "profile.safetensors")
    trained: list[Pyramid] = []
    write = learn.write_result
    monkeypatch.setattr(learn, "write_result", lambda pyramid, *rest: (trained.append(pyramid), write(pyramid, *rest)))
    settings = QUICK | {"fine_tune": 0, "soft": 0, "hard": 0, "keep": 0.6, "steps": 2}
    recipe = {"passes": [], "calibration": {"samples": 16, "states": 32}}
    train("magic-pyramid", folder, texts, tmp_path / "new", settings=settings, recipe=recipe)
    assert trained[0].routing is not None and trained[0].routing.logits and trained[0].routing.mode == "hard"
    made = Profile.load(tmp_path / "new" / "profile.safetensors")
    assert made.info.learned["lte"] == record["lte"] and "magic-pyramid" in made.info.learned
    assert {name: value.tolist() for name, value in made.learned("lte").items()} == {
        name: value.tolist() for name, value in routers.items()
    }
    assert "thresholds" in made.learned("magic-pyramid") and not made.learned("recover")
    assert not [each for each in caplog.records if "weights of before" in each.message]
    methods = [{"token-prune": {}}, {"ffn-route": {"most": 1.0}}, "early-exit", {"dynamic-int8": {"scales": "row"}}]
    build = compile_model(tmp_path / "new", {"passes": ["unpad", *methods], "threads": 1}, tmp_path / "build")
    assert {dial.name for dial in build.manifest.dials} == {"prune", "route_threshold", "exit_threshold"}
    assert all(result.changed for result in build.manifest.passes)
    learned_by_others(tmp_path / "new", "topk", "others")
    told = [each.message for each in caplog.records if "weights of before" in each.message]
    assert len(told) == 2 and "--method lte" in told[0] + told[1]
    (folder / "profile.safetensors").write_bytes(b"none")
    assert learned_by_others(folder, "lte", "others") == ({}, {}) and "is not kept" in caplog.records[-1].message


@pytest.mark.parametrize("fault", ["no profile", "cut", "NaN", "other weights"])
def test_a_profile_that_cannot_be_used_is_left_aside(
    fault: str, tmp_path: Path, kept: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Training does without it and says so; where it should give thresholds, it is refused."""
    folder, texts = model(tmp_path / "model"), data(tmp_path / "data.jsonl")
    path = folder / "profile.safetensors"
    tensors = {"learned.magic-pyramid.thresholds": np.zeros(2, np.float32)}
    info = ProfileInfo(model="other", data="d", samples=1, tokens=1, learned={"magic-pyramid": {}})
    Profile(info, tensors).save(path)
    if fault == "NaN":
        save_file({name: value + np.nan for name, value in tensors.items()}, path, {"trimtab": info.model_dump_json()})
    elif fault != "other weights":
        path.write_bytes(path.read_bytes()[:-3] if fault == "cut" else b"no profile")
    with pytest.raises(TrimtabError, match="hard has no thresholds to prune by") as refusal:
        train("magic-pyramid", folder, texts, tmp_path / "new", settings=QUICK | {"soft": 0})
    assert "keep" in str(refusal.value.hint) and "calibrate" not in str(refusal.value)
    caplog.clear()
    train("magic-pyramid", folder, texts, tmp_path / "new", settings=QUICK | {"steps": 0})
    (warning,) = [each.message for each in caplog.records if "does not go on from" in each.message]
    assert str(path) in warning and len(kept) == 1


def test_an_encoder_gets_a_head_for_the_classes_of_the_data(tmp_path: Path, kept: list[dict[str, np.ndarray]]) -> None:
    from transformers import AutoModel

    folder = model(tmp_path / "model")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules), ("sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True}),
        ("1_Pooling/config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
    ):  # fmt: skip
        (folder / name).write_text(json.dumps(content))
    texts = data(tmp_path / "data.jsonl", count=40)
    texts.write_text(texts.read_text().replace('"label": 0', '"label": "bad"').replace('"label": 1', '"label": "good"'))
    trained = train("magic-pyramid", folder, texts, tmp_path / "new", settings={"steps": 8})
    assert trained is not None and trained.record["stages"]["fine_tune"] == 3
    assert kept[0]["classifier.weight"].shape == (2, 32)
    assert not list((tmp_path / "kept0").glob("modules.json")) + list((tmp_path / "kept0").glob("sentence*"))
    tuned = read_checkpoint(tmp_path / "kept0")
    assert (tuned.architecture, class_labels(tuned.config)) == ("BertForSequenceClassification", ("bad", "good"))
    ids = [load_tokenizer(each).encode(["W4 w5"])["input_ids"] for each in (folder, tmp_path / "kept0")]
    np.testing.assert_array_equal(*ids)
    assert ids[0][0, 1] == 8  # lower case


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"architecture": "GPT2ForSequenceClassification", "model_type": "gpt2"}, ModelError, "does not train gpt2"),
        (
            {"architecture": "MPNetModel", "model_type": "mpnet"},
            ModelError,
            "mpnet models: its attention is of relative",
        ),
        ({"config": {"num_labels": 1}}, ModelError, "gives it a score"),
        ({"config": {"num_labels": 3, "problem_type": "multi_label_classification"}}, ModelError, "number of labels"),
        ({"config": {"num_hidden_layers": 1}}, ModelError, "has one layer, and a pyramid needs two"),
        ({"label": 2}, DataError, "has the label 2, outside 0..1"),
        ({"settings": {"soft": 0}}, RecipeError, "hard has no thresholds"),
        ({"settings": {"soft": 0, "hard": 0, "exits": 0}}, RecipeError, "no stage is left"),
        ({"settings": {"head_width": 7}}, RecipeError, "head_width"),
        ({"settings": QUICK | {"lr": 1e30}}, TrimtabError, "use a smaller --lr"),
        ({"profile": True}, RecipeError, "takes no Profile"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_said(
    change: dict[str, Any], kind: type[TrimtabError], says: str, tmp_path: Path, kept: list[Any]
) -> None:
    config: dict[str, Any] = {"num_labels": 2} | change.get("config", {})
    if config.pop("num_hidden_layers", 2) == 1:
        import heads

        small = head_model("bert", SEED, **config)
        small.bert.encoder.layer = small.bert.encoder.layer[:1]
        small.config.num_hidden_layers = 1
        small.save_pretrained(tmp_path / "model")
        heads.pair_tokenizer().save_pretrained(tmp_path / "model")
    else:
        model(tmp_path / "model", **config)
    if "model_type" in change:
        path = tmp_path / "model" / "config.json"
        known = json.loads(path.read_text())
        path.write_text(
            json.dumps(known | {"architectures": [change["architecture"]], "model_type": change["model_type"]})
        )
    with pytest.raises(kind, match=says):
        train(
            "magic-pyramid", tmp_path / "model", data(tmp_path / "data.jsonl", change.get("label")), tmp_path / "new",
            settings=change.get("settings", {"steps": 2}), profile="p.safetensors" if "profile" in change else None,
        )  # fmt: skip
    assert not (tmp_path / "new").exists()
    assert not kept


def test_a_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty seconds of a minute had gone when the run was killed, however long ago that was."""
    monkeypatch.setattr("trimtab.training.clock.time", SimpleNamespace(monotonic=lambda: 1000.0))
    clock = Clock(1.0, None, 1000.0 - 30, 6.0, ran=30.0)
    assert clock.ran == 30
    assert clock.at(5) == pytest.approx(30 / 54)
    assert Clock(1.0, 100, 1000.0 - 30, 6.0, ran=30.0).at(5) == 0.05


def test_shares_add_up() -> None:
    assert Settings().shares(new_head=False) == {"soft": 0.25, "hard": 0.5, "exits": 0.25}
    assert Settings().shares(new_head=True)["fine_tune"] == 3 / 7
    assert Settings(fine_tune=0, soft=0, hard=0).shares(new_head=True) == {"exits": 1.0}


def test_unfinished_work_is_of_one_key_and_one_process(tmp_path: Path) -> None:
    run = Unfinished(tmp_path / "new", {"seed": 1})
    with pytest.raises(BuildError, match="another process is training"):
        Unfinished(tmp_path / "new", {"seed": 1})
    run.keep(done=["soft"])
    (run.folder / "soft.safetensors").write_bytes(b"x")
    run.release()
    again = Unfinished(tmp_path / "new", {"seed": 1})
    assert again.state == {"done": ["soft"]}
    again.release()
    other = Unfinished(tmp_path / "new", {"seed": 2})
    assert other.state == {} and not other.folder.exists()
    other.keep(done=[])
    (other.folder / "state.json").write_text('{"key": ')
    other.release()
    damaged = Unfinished(tmp_path / "new", {"seed": 2})
    assert damaged.state == {}
    damaged.finish()
    assert list(tmp_path.iterdir()) == []
