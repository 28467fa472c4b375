"""What users of TensorRT targets can do wrong: each is told before the long work, by name, and leaves nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import tiny
from rewrite import canonical, head_profile, profile_of
from zoo import DECODERS, FAMILIES, exported

from trimtab.compiler import compile_model
from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.targets import child, get_target
from trimtab.compiler.targets.tensorrt import target as module
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.compiler.targets.tensorrt.prepare import prepare
from trimtab.compiler.workload import Workload
from trimtab.passes import PassContext, pass_class, run_passes
from trimtab.passes.errors import RecipeError, TargetError
from trimtab.passes.graph import save_graph

SIZES = Workload(batch=(1, 2, 4), tokens=(1, 8, 16))
RTX = "tensorrt-rtx"


def build(tmp_path: Path, **options: Any) -> Path:
    """A small engine, and its folder."""
    pytest.importorskip("tensorrt_rtx")
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[batch, 8] x) => (float[batch, 8] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    get_target(RTX).build(tmp_path / "m.onnx", SIZES, tmp_path / "engine", options=EngineOptions(**options))
    return tmp_path


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "engine" / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_engine_of_another_version_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    folder = build(tmp_path)
    edited(folder, version="1.2.3")
    (folder / "engine" / "model.engine").write_bytes(b"nobody reads this")
    with pytest.raises(TargetError, match=r"need tensorrt_rtx 1\.2\.3, and .* is installed.*compile the model again"):
        get_target(RTX).open(folder)


def test_an_engine_of_another_gpu_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(tmp_path, gpus=("8.6", "8.9"))
    assert json.loads((folder / "engine" / "engine.json").read_text())["compute_capabilities"] == ["8.6", "8.9"]
    monkeypatch.setattr(module, "compute_capability", lambda: "12.0")
    with pytest.raises(TargetError, match=r"capability 8\.6, 8\.9, and this one has 12\.0.*engine: {gpus"):
        get_target(RTX).open(folder)
    edited(folder, compute_capabilities=[], gpu="9.0")
    with pytest.raises(TargetError, match=r"capability 9\.0, and this one has 12\.0.*again on this machine"):
        get_target(RTX).open(folder)


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "engine" / "engine.json").write_text('{"target": "tensorrt-rtx"}')
    with pytest.raises(TargetError, match=r"engine\.json: is missing or not valid \(Field required"):
        get_target(RTX).open(folder)
    with pytest.raises(TargetError, match="No such file"):
        EngineInfo.read(tmp_path)


def test_tensorrt_wants_its_gpu_before_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.TensorRT, "_require", lambda self: None)
    monkeypatch.setattr(module, "gpu_present", lambda: False)
    monkeypatch.setattr(module, "run_child", lambda *a, **k: pytest.fail("nothing may be built"))
    with pytest.raises(TargetError, match=r"built on the GPU that it is for.*--target tensorrt-rtx"):
        get_target("tensorrt").build(tmp_path / "m.onnx", SIZES, tmp_path / "engine")
    monkeypatch.setattr(module, "gpu_present", lambda: True)
    with pytest.raises(TargetError, match=r"engine\.gpus: tensorrt builds for the GPU of this machine"):
        get_target("tensorrt").build(tmp_path / "m.onnx", SIZES, tmp_path / "e", options=EngineOptions(gpus=("8.9",)))
    assert not (tmp_path / "engine").exists()


def test_a_gpu_that_the_library_does_not_build_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"builds for no GPU 9\.0, but for: .*8\.9"):
        build(tmp_path, gpus=("9.0",))
    assert not list((tmp_path / "engine").iterdir())


def test_wishes_are_checked_when_the_recipe_is_read() -> None:
    with pytest.raises(RecipeError, match=r"engine\.gpus: 'ada' is no compute capability"):
        load_recipe({"engine": {"gpus": ["ada"]}})
    with pytest.raises(RecipeError, match="segment"):
        load_recipe({"engine": {"segment": 2}})
    with pytest.raises(RecipeError, match=r"engine\.segments"):
        load_recipe({"engine": {"segments": 0}})


def test_what_a_target_cannot_run_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    recipe = {"passes": ["dynamic-int8"], "target": RTX}
    (unread := tmp_path / "model.onnx").write_text("no ONNX file, if somebody looked")
    with pytest.raises(TargetError, match="tensorrt-rtx cannot run what pass dynamic-int8 makes"):
        compile_model(unread, recipe, tmp_path / "out")
    with pytest.raises(TargetError, match="engine: target onnxruntime builds no engines"):
        compile_model(unread, {"passes": [], "engine": {"segments": 2}}, tmp_path / "out")
    packed = {"passes": ["unpad"], "target": RTX, "engine": {"segments": 2}}
    with pytest.raises(TargetError, match=r"engine\.segments: 2 engines.*whose number unpad counts at run time"):
        compile_model(unread, packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wish", ["refit", "weight_streaming"])
def test_refit_and_streaming_where_they_are_offered(tmp_path: Path, wish: str) -> None:
    folder = build(tmp_path, **{wish: True})
    assert json.loads((folder / "engine" / "engine.json").read_text())[wish] is True
    assert EngineInfo.read(folder / "engine").weight_streaming == (wish == "weight_streaming")


def test_wishes_that_are_not_offered_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without the flag: the child looks for it, and says so before it builds."""
    code = (
        "import sys; from polygraphy.mod.trt_importer import lazy_import_trt; trt = lazy_import_trt();"
        "import trimtab.compiler.targets.tensorrt.build_engine as b; del b.trt.BuilderFlag.REFIT;"
        "b.main(*sys.argv[1:])"
    )
    monkeypatch.setattr(child, "command", lambda job, answer: [sys.executable, "-c", code, str(job), str(answer)])
    with pytest.raises(TargetError, match=r"(?s)offers no refit; leave engine\.refit out"):
        build(tmp_path, refit=True)
    assert not list((tmp_path / "engine").iterdir())


def test_an_engine_that_does_not_load_is_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU, a fresh process loads what was built, as the last step."""
    monkeypatch.setattr(module, "gpu_present", lambda: True)  # and there is none, so that loading fails
    with pytest.raises(TargetError, match=r"the finished engine does not load: tensorrt-rtx: .*(failed|crashed)"):
        build(tmp_path)
    assert not list((tmp_path / "engine").iterdir())


def test_the_check_of_an_engine_for_another_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.compiler.checks import selfcheck

    target = get_target(RTX)
    monkeypatch.setattr(type(target), "cannot_run_here", lambda self: None)
    monkeypatch.setattr(selfcheck, "compute_capability", lambda: "8.9")
    recipe = load_recipe({"engine": {"gpus": ["8.6"]}})
    assert "is for GPUs of compute capability 8.6" in str(selfcheck._skip(target, recipe, 0))
    assert selfcheck._skip(target, load_recipe({"engine": {"gpus": ["8.6", "8.9"]}}), 0) is None


def test_an_engine_for_another_gpu_is_built_and_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX 1.7 runs on no H100; engines built there are for other machines."""
    pytest.importorskip("tensorrt_rtx")
    target = get_target(RTX)
    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module.TensorRT, "_load_once", lambda *a: pytest.fail("it cannot be loaded here"))
    monkeypatch.setattr(module, "compute_capability", lambda: "9.0")
    assert "runs on no GPU of compute capability 9.0" in str(target.cannot_run_here())
    build(tmp_path)
    monkeypatch.setattr(module, "compute_capability", lambda: "8.9")
    assert target.cannot_run_here() is None
    build(tmp_path, gpus=("8.6",))
    monkeypatch.setattr(module, "compute_capability", lambda: "13.0")
    assert target.cannot_run_here() is None


def test_a_workload_that_does_not_cover_the_inputs_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    text = """<ir_version: 9, opset_import: ["" : 18]>
    g (float[batch, tokens, boxes] x) => (float[batch, tokens, boxes] y) { y = Relu (x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match=r"dynamic axis 'boxes' has no range in the workload"):
        get_target(RTX).build(tmp_path / "m.onnx", SIZES, tmp_path / "engine")
    assert not list((tmp_path / "engine").iterdir())


RECIPES: dict[str, dict[str, Any]] = {
    "ffn-split": {},
    "ffn-split int8 + low rank": {"ffn-split": {"heavy": 0.25, "heavy_form": "int8", "rank": 8}},
    "ffn-split int4": {"ffn-split": {"heavy": 1.0, "heavy_form": "int4", "block": 16}},
    "ffn-split drop": {"ffn-split": {"heavy": 0.5, "rest_form": "drop"}},
    "ffn-topk": {"ffn-topk": {"density": 0.2, "take": 0.3, "recall": 0.01, "dense_above": 8}},
    "ffn-topk int8": {"ffn-topk": {"density": 0.2, "take": 0.3, "recall": 0.01, "block": 4, "weights": "int8"}},
    "weight-only 8": {"weight-only": {"bits": 8}},
    "weight-only 4": {"weight-only": {"bits": 4, "block": 16}},
    "precision": {"precision": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("family", "exporter"), [("bert", "dynamo"), ("llama", "cached")])
def test_every_recipe_is_built(tmp_path: Path, family: str, exporter: str, name: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = canonical(exported(family, exporter))
    passes = RECIPES[name] or {name: {}}
    target = get_target(RTX)
    context = PassContext(profile_of(graph), capability=target.probe())
    steps = [pass_class(key).model_validate(options) for key, options in passes.items()]
    assert all(result.changed for result in run_passes(graph, steps, context))
    save_graph(graph, tmp_path / "m.onnx")
    workload = SIZES.model_copy(update={"past": (0, 4, 16)}) if exporter == "cached" else SIZES
    files = target.build(tmp_path / "m.onnx", workload, tmp_path / "engine")
    info = EngineInfo.read(tmp_path / "engine")
    assert [profile.name for profile in info.engines[0].profiles] == (
        ["prompt", "step"] if exporter == "cached" else ["all"]
    )
    assert files[0].stat().st_size > 10000
    if name == "precision":
        assert "HALF" in info.precisions


def test_every_family_and_exporter_is_parsed(tmp_path: Path) -> None:
    """One child for all: what it refuses is named."""
    pytest.importorskip("tensorrt_rtx")
    cases = [(family, "dynamo") for family in FAMILIES] + [(family, "cached") for family in DECODERS]
    cases += [("llama", "genai"), ("gpt2", "torchscript"), ("bert", "torchscript")]
    models = []
    for family, exporter in cases:
        folder = tmp_path / f"{family}-{exporter}"
        folder.mkdir()
        save_graph(canonical(exported(family, exporter)), folder / "m.onnx")
        workload = SIZES.model_copy(update={"past": (0, 4, 16)}) if exporter in ("cached", "genai") else SIZES
        models += prepare(folder / "m.onnx", workload, folder, plugins=False, segments=1).models
    refused = module.TensorRTRTX().parse(models)
    assert dict(zip(cases, refused, strict=True)) == {case: [] for case in cases}


def test_a_head_that_chooses_its_rows_is_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = canonical(exported("llama", "cached"))
    head = pass_class("head-topk").model_validate({"take": 16, "most": 1.0, "dense_above": 8})
    run_passes(graph, [head], PassContext(head_profile(graph)))
    save_graph(graph, tmp_path / "m.onnx")
    workload = SIZES.model_copy(update={"past": (0, 4, 16)})
    get_target(RTX).build(tmp_path / "m.onnx", workload, tmp_path / "engine")
    assert EngineInfo.read(tmp_path / "engine").lowered["SparseHead"] == 1


def test_the_whole_road(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = tiny.model(tmp_path / "m.onnx")
    topk = {"ffn-topk": {"density": 0.3, "take": 0.5, "recall": 0.01, "dense_above": 20}}
    recipe = {"passes": [topk, "precision"], "target": RTX, "workload": SIZES.model_dump()}
    made = compile_model(model, recipe, tmp_path / "out", data=tiny.data(tmp_path / "data.npz"))
    assert made.manifest.check.why == "a tensorrt-rtx engine runs on a GPU, and this machine has none" or (
        made.manifest.check.ran
    )
    info = EngineInfo.read(tmp_path / "out" / "engine")
    assert info.lowered == {"SelectBlocks": 1, "SparseUp": 1, "SparseDown": 1} and "HALF" in info.precisions
    assert {"engine/engine.json", "engine/model.engine", "model/model.onnx"} <= set(made.manifest.files)
    assert np.prod(info.engines[0].profiles[0].shapes["input_ids"][2]) == 64
