"""Compiling: what a build contains, what is reused, and what is refused before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import tiny
from onnx import numpy_helper

from trimtab import passes
from trimtab.compiler import load, pipeline, profile_cache
from trimtab.compiler.builds.build import open_build
from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.targets.base import MODEL
from trimtab.compiler.targets.onnxruntime import OnnxRuntime
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import PassContext, PassResult
from trimtab.passes.errors import BuildError, DataError, ModelError, PassError, ProfileError, RecipeError, TargetError
from trimtab.passes.profile import Profile

CALIBRATION = {"samples": 16, "batch_size": 4, "max_tokens": 12, "states": 64}
RECIPE = {"passes": ["canonicalize", {"dampen": {"factor": 0.5}}], "calibration": CALIBRATION, "threads": 1}


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(passes._PASSES, "dampen", tiny.PASS)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.model(tmp_path / "model.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.data(tmp_path / "data.npz")


def test_a_compile_does_what_its_passes_say(model: Path, data: Path, tmp_path: Path) -> None:
    """y = x + FFN(x); with the down projection halved, all of the FFN but its last bias is halved."""
    said: list[str] = []
    build = compile_model(
        model, RECIPE, tmp_path / "build", data=data, progress=lambda what, done, total: said.append(what)
    )
    feeds = {"input_ids": tiny.ids(3, 11, seed=5)}
    found = load(build.path).run(feeds)["last_hidden_state"]
    identity = compile_model(model, {"passes": ["canonicalize"]}, tmp_path / "identity").path
    dense = load(identity).run(feeds)["last_hidden_state"]
    w = {tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in onnx.load(model).graph.initializer}
    x = w["table"][feeds["input_ids"]]
    hidden = np.maximum(x @ w["up"] + w["up_bias"], 0) @ w["down"]
    np.testing.assert_allclose(dense, x + hidden + w["down_bias"], atol=1e-5)
    np.testing.assert_allclose(found, x + hidden / 2 + w["down_bias"], atol=1e-5)
    assert {"open the model", "calibrate", "write the model", "check the engine"} <= set(said)


def test_the_manifest_says_what_was_done(model: Path, data: Path, tmp_path: Path) -> None:
    build = compile_model(model, RECIPE, tmp_path / "build", data=data)
    manifest = open_build(build.path).manifest
    assert manifest == build.manifest
    assert manifest.origin == str(model)
    assert [report.name for report in manifest.passes] == ["canonicalize", "dampen"]
    assert manifest.passes[1].changed == 1
    assert manifest.passes[1].left[0].where == "layer 9 FFN"
    params = tiny.ROWS * tiny.WIDTH + 2 * tiny.WIDTH * tiny.NEURONS + tiny.NEURONS + tiny.WIDTH
    assert manifest.sizes.dense_bytes == manifest.sizes.compiled_bytes == 4 * params
    assert manifest.sizes.dense_ffn_bytes == 4 * (params - tiny.ROWS * tiny.WIDTH)
    assert manifest.sizes.compiled_ffn_bytes == 123
    assert load_recipe(manifest.recipe) == load_recipe(RECIPE) == load_recipe(build.path / "recipe.yaml")
    assert manifest.check.ran
    assert 0.01 < (manifest.check.outputs[0].relative_l2 or 0) < 1
    assert set(manifest.files) >= {
        "model/model.onnx",
        "model/model.onnx.data",
        "profile.safetensors",
        "recipe.yaml",
    }
    assert Profile.load(build.path / "profile.safetensors").info.model == manifest.fingerprint
    report = (build.path / "report.md").read_text()
    assert "| layer 9 FFN | it does not exist |" in report
    assert "| 0 | 0.5 |" in report


def test_nothing_changed_nothing_done(model: Path, data: Path, tmp_path: Path) -> None:
    first = compile_model(model, RECIPE, tmp_path / "build", data=data)
    again = compile_model(model, RECIPE, tmp_path / "build", data=data)
    assert not first.reused
    assert again.reused
    assert again.manifest == first.manifest
    assert not compile_model(model, RECIPE, tmp_path / "build", data=data, force=True).reused


@pytest.mark.parametrize("change", ["option", "workload", "data", "model"])
def test_every_input_counts(model: Path, data: Path, tmp_path: Path, change: str) -> None:
    inputs = {"model": model, "recipe": RECIPE, "data": data}
    changed = {
        "option": lambda: {"recipe": RECIPE | {"passes": [{"dampen": {"factor": 0.75}}]}},
        "workload": lambda: {"recipe": RECIPE | {"workload": {"batch": 2}}},
        "data": lambda: {"data": tiny.data(tmp_path / "more.npz", samples=40)},
        "model": lambda: {"model": tiny.model(tmp_path / "other.onnx", seed=1)},
    }[change]()
    compile_model(**inputs, out=tmp_path / "build")
    assert not compile_model(**inputs | changed, out=tmp_path / "build").reused
    assert compile_model(**inputs | changed, out=tmp_path / "build").reused


@pytest.mark.parametrize("external", [False, True])
def test_every_byte_of_a_model_counts(tmp_path: Path, external: bool) -> None:
    """Of each tensor the first and the last, a bias of a few values among them, with the file's size and mtime kept."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    path = tiny.model(tmp_path / "m.onnx", seed=seed, external=external)
    file = tmp_path / ("m.onnx.data" if external else "m.onnx")
    keys = {compile_model(path, {"passes": []}, tmp_path / "build").manifest.key}
    tensors = [numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer]
    whole, times = file.read_bytes(), file.stat()
    places = [whole.index(raw) + place for raw in tensors for place in (0, len(raw) - 4)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        build = compile_model(path, {"passes": [], "check": False}, tmp_path / "build")
        assert not build.reused
        keys.add(build.manifest.key)
    assert len(keys) == 1 + len(places) > 10


def test_a_model_that_changes_while_it_is_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build would have the key of one model and the weights of another."""
    path = tiny.model(tmp_path / "m.onnx", external=True)
    check = pipeline.self_check

    def checked(*args: Any) -> Any:
        data = bytearray((tmp_path / "m.onnx.data").read_bytes())
        data[-1] ^= 1
        (tmp_path / "m.onnx.data").write_bytes(data)
        return check(*args)

    monkeypatch.setattr(pipeline, "self_check", checked)
    with pytest.raises(ModelError, match=r"changed while it was compiled; compile it again"):
        compile_model(path, {"passes": []}, tmp_path / "build")
    assert not (tmp_path / "build").exists()


def test_data_that_change_while_they_are_read_are_refused(
    model: Path, word_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("w1 w2 w3\nw4 w5\n")
    source = Source("m", model, word_tokenizer, None, None, "onnx")
    calibrate = profile_cache.calibrate

    def calibrated(*args: Any, **options: Any) -> Profile:
        texts.write_text("w1 w2 w3\nw4 w6\n")
        return calibrate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(profile_cache, "calibrate", calibrated)
        with pytest.raises(DataError, match=r"texts.txt: changed while"):
            compile_model(source, RECIPE, tmp_path / "build", data=texts)
    assert not (tmp_path / "build").exists()
    compile_model(source, RECIPE, tmp_path / "build", data=texts)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_every_byte_of_a_tokenizer_counts(model: Path, word_tokenizer: Path, tmp_path: Path, name: str) -> None:
    source = Source("m", model, word_tokenizer, None, None, "onnx")
    compile_model(source, {"passes": []}, tmp_path / "build")
    assert compile_model(source, {"passes": []}, tmp_path / "build").reused
    (word_tokenizer / name).write_text((word_tokenizer / name).read_text().replace("[PAD]", "[PAP]"))
    assert not compile_model(source, {"passes": []}, tmp_path / "build").reused


def test_a_profile_with_nan_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    profile = Profile.load(compile_model(model, RECIPE, tmp_path / "first", data=data).path / "profile.safetensors")
    profile.tensors["ffn.0.states"][3, 5] = np.nan
    said = refused(ProfileError, tmp_path, model, RECIPE, profile=profile)
    assert "the profile: 1 of" in said
    assert "'ffn.0.states'" in said


def test_a_damaged_build_is_made_anew(model: Path, tmp_path: Path) -> None:
    build = compile_model(model, {"passes": []}, tmp_path / "build")
    build.model.write_text("damaged")
    assert not compile_model(model, {"passes": []}, tmp_path / "build").reused
    load(tmp_path / "build")


def test_an_interrupted_compile_need_not_calibrate_again(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*args: Any, **options: Any) -> Profile:
        calls.append(options)
        return calibrate(*args, **options)

    calibrate = profile_cache.calibrate
    monkeypatch.setattr(profile_cache, "calibrate", counting)
    with monkeypatch.context() as broken:
        broken.setattr(tiny.Dampen, "run", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile_model(model, RECIPE, tmp_path / "build", data=data)
    assert not (tmp_path / "build").exists()
    compile_model(model, RECIPE, tmp_path / "build", data=data)
    assert len(calls) == 1
    compile_model(model, RECIPE | {"calibration": CALIBRATION | {"seed": 1}}, tmp_path / "build", data=data)
    assert len(calls) == 2


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_damaged_profile_in_the_cache_is_measured_anew(model: Path, data: Path, tmp_path: Path) -> None:
    first = compile_model(model, RECIPE, tmp_path / "build", data=data)
    (kept,) = (tmp_path / "cache" / "profiles").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    second = compile_model(model, RECIPE, tmp_path / "second", data=data)
    assert second.manifest.profile == first.manifest.profile


def test_a_profile_takes_the_place_of_data(model: Path, data: Path, tmp_path: Path) -> None:
    first = compile_model(model, RECIPE, tmp_path / "build", data=data)
    second = compile_model(model, RECIPE, tmp_path / "second", profile=first.path / "profile.safetensors")
    assert second.manifest.profile == first.manifest.profile
    assert second.manifest.data == first.manifest.data
    assert "calibrate" not in second.manifest.seconds


def test_the_check_can_be_left_out(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.compiler.checks import selfcheck

    build = compile_model(model, {"passes": [], "check": False}, tmp_path / "build")
    assert not build.manifest.check.ran
    monkeypatch.setattr(selfcheck, "LIMIT", 100)
    build = compile_model(model, {"passes": []}, tmp_path / "build")
    assert "memory" in (build.manifest.check.why or "")
    assert "Not run" in (build.path / "report.md").read_text()


def test_calls_that_are_too_large_for_a_check(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.compiler.checks import selfcheck

    recipe = {"passes": [], "workload": {"batch": 9, "tokens": 8}}
    assert compile_model(model, recipe, tmp_path / "build").manifest.check.ran
    monkeypatch.setattr(selfcheck, "MAX_TOKENS", 71)
    build = compile_model(model, recipe, tmp_path / "build", force=True)
    assert build.manifest.check.why == "the smallest call has 72 tokens; `trimtab validate` runs it"


def test_errors_name_the_model_and_not_a_hidden_folder(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Odd", ["x"], ["y"], domain="elsewhere")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("elsewhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "odd.onnx")
    message = refused(TargetError, tmp_path, tmp_path / "odd.onnx", {"passes": []})
    assert message.startswith(f"{tmp_path / 'odd.onnx'}: ONNX Runtime does not take") and "trimtab-part" not in message


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ((), ("y",), "has no inputs"), (("x",), (), "has no outputs"),
        (("half",), ("y",), "'half', one of its inputs, is bfloat16"),
        (("x",), ("half",), "'half', one of its outputs, is bfloat16"),
    ],
)  # fmt: skip
def test_models_that_no_call_can_be_made_of(
    tmp_path: Path, inputs: tuple[str, ...], outputs: tuple[str, ...], says: str
) -> None:
    def ends(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
        kinds = {name: onnx.TensorProto.BFLOAT16 if name == "half" else onnx.TensorProto.FLOAT for name in names}
        return [onnx.helper.make_tensor_value_info(name, kind, [2]) for name, kind in kinds.items()]

    source, target = (inputs or ("k",))[0], (outputs or ("unused",))[0]
    to = onnx.TensorProto.BFLOAT16 if target == "half" else onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", [source], [target], to=to)], "g", ends(inputs), ends(outputs),
        [] if inputs else [numpy_helper.from_array(np.zeros(2, np.float32), "k")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    assert says in refused(ModelError, tmp_path, tmp_path / "m.onnx", {"passes": []})


def refused(kind: type[Exception], tmp_path: Path, *args: Any, **options: Any) -> str:
    """The message of a compile that fails, after which nothing lies where the build would be."""
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")
    with pytest.raises(kind) as caught:
        compile_model(*args, tmp_path / "build", **options)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before
    return str(caught.value)


def test_a_pass_that_needs_data_gets_none(model: Path, tmp_path: Path) -> None:
    message = refused(DataError, tmp_path, model, RECIPE)
    assert "pass dampen" in message
    assert "--data" in message


def test_a_profile_of_another_model(model: Path, data: Path, tmp_path: Path) -> None:
    other = tiny.model(tmp_path / "other.onnx", seed=1)
    profile = compile_model(other, RECIPE, tmp_path / "done", data=data).path / "profile.safetensors"
    assert "belongs to another model" in refused(ProfileError, tmp_path, model, RECIPE, profile=profile)


@pytest.mark.parametrize(("poison", "external"), [(float("nan"), True), (float("inf"), True), (float("nan"), False)])
def test_weights_that_are_not_finite(tmp_path: Path, poison: float, external: bool) -> None:
    model = tiny.model(tmp_path / "model.onnx", poison=poison, external=external)
    message = refused(ModelError, tmp_path, model, {"passes": ["canonicalize"]})
    assert "weight 'up': 1 of its values" in message
    assert "[3, 7]" in message


def test_a_pass_that_makes_nan(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(self: tiny.Dampen, graph: gs.Graph, context: PassContext) -> PassResult:
        graph.tensors()["down"].values = np.full((tiny.NEURONS, tiny.WIDTH), np.nan, np.float32)
        return PassResult(self.name, 1)

    monkeypatch.setattr(tiny.Dampen, "run", spoil)
    assert "weight 'down'" in refused(ModelError, tmp_path, model, RECIPE | {"check": False}, data=data)


def test_no_ffn(data: Path, tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "table.onnx", ffn=False)
    assert "no FFN was found in the model" in refused(ModelError, tmp_path, model, RECIPE, data=data)


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not an ONNX file")
    assert "not an ONNX" in refused(ModelError, tmp_path, tmp_path / "text.onnx", {"passes": []})
    assert "no such file" in refused(ModelError, tmp_path, tmp_path / "none.onnx", {"passes": []})


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntim"])
def test_a_target_that_is_not_there(model: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorrt" else find(name, *rest)
    )
    message = refused(TargetError, tmp_path, model, {"passes": []}, target=target)
    assert "pip install" in message or "did you mean 'onnxruntime'" in message


def test_a_pass_that_fails_names_itself(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(tiny.Dampen, "run", fail)
    message = refused(PassError, tmp_path, model, RECIPE, data=data)
    assert message.startswith("pass dampen (after canonicalize): ZeroDivisionError")


def test_an_engine_that_gives_nan_is_not_let_out(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spoiled(OnnxRuntimeRunner):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: y * np.nan for name, y in super().run(inputs).items()}

    monkeypatch.setattr(OnnxRuntime, "open", lambda self, folder, **_: Spoiled(folder / MODEL))
    assert "NaN" in refused(BuildError, tmp_path, model, RECIPE, data=data)


def test_a_bad_recipe(model: Path, tmp_path: Path) -> None:
    assert "'factor'" in refused(RecipeError, tmp_path, model, {"passes": [{"dampen": {"factro": 1}}]})
