"""What `trimtab package --triton` writes, field by field against Triton's own schema, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import triton_server
from sealed import entry, listed, seal
from typer.testing import CliRunner

from trimtab.compiler import compile_model
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.cli.app import app
from trimtab.compiler.packaging.triton import package_triton
from trimtab.compiler.packaging.triton.carried import CARRIED, write_code
from trimtab.compiler.packaging.triton.config import is_batched, model_config
from trimtab.passes.errors import BuildError, ModelError, TargetError
from trimtab.plugins.library import library_path

pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
from google.protobuf import text_format  # noqa: E402

WORKLOAD = {"batch": [1, 4, 8], "tokens": [4, 16, 32]}
IDS = {"input_ids": [-1, -1], "attention_mask": [-1, -1], "token_type_ids": [-1, -1]}


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("bert")
    source = triton_server.exported("bert", folder / "model")
    return compile_model(source, {"passes": [], "workload": WORKLOAD, "threads": 2}, folder / "build")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("llama")
    source = triton_server.exported("llama", folder / "model")
    return compile_model(source, {"passes": [], "workload": WORKLOAD, "threads": 1}, folder / "build")


def altered(build: Build, folder: Path, **changes: Any) -> Build:
    """A copy of `build` whose manifest says something else."""
    shutil.copytree(build.path, folder)
    seal(folder, **changes)
    return open_build(folder)


def with_engines(build: Build, folder: Path, *engines: tuple[dict[str, list[int]], dict[str, list[int]]]) -> Build:
    """A copy of `build` for TensorRT, with engines that take and give {name: shape}."""
    sizes = dict(zip(("batch", "tokens"), (WORKLOAD["batch"], WORKLOAD["tokens"]), strict=True))
    described = []
    for number, sides in enumerate(engines):
        inputs, outputs = (
            [
                {"name": n, "dtype": "int64" if "ids" in n or "mask" in n else "float", "shape": s}
                for n, s in side.items()
            ]
            for side in sides
        )
        shapes = {
            tensor["name"]: [
                [sizes["tokens" if place else "batch"][level] if size < 0 else size for place, size in enumerate(shape)]
                for level in range(3)
            ]
            for tensor in inputs
            for shape in [tensor["shape"]]
        }
        profiles = [{"name": "all", "shapes": shapes}]
        described.append({"file": f"{number}.engine", "inputs": inputs, "outputs": outputs, "profiles": profiles})
    altered(build, folder, target="tensorrt")
    (folder / "engine").mkdir()
    for engine in described:
        (folder / "engine" / engine["file"]).write_bytes(f"engine {engine['file']}".encode())
    info = {"target": "tensorrt", "library": "tensorrt", "version": "11.1.0", "precisions": ["FLOAT"], "gpu": "9.0"}
    (folder / "engine" / "engine.json").write_text(json.dumps(info | {"engines": described}))
    names = [path.relative_to(folder).as_posix() for path in (folder / "engine").iterdir()]
    seal(folder, files=listed(folder) | {name: entry(folder / name) for name in names})
    return open_build(folder)


def config(model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(), pb.ModelConfig())


def tensors(described: Any) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (pb.DataType.Name(t.data_type), list(t.dims)) for t in described}


def test_onnxruntime_backend(bert: Build, tmp_path: Path) -> None:
    done = cli("package", bert.path, "--triton", tmp_path / "repo", "--name", "sst", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["models"] == ["sst", "sst_engine"]
    engine, front = config(tmp_path / "repo" / "sst_engine"), config(tmp_path / "repo" / "sst")
    assert (engine.name, engine.backend, engine.max_batch_size) == ("sst_engine", "onnxruntime", 8)
    ids = ("TYPE_INT64", [-1])
    assert tensors(engine.input) == {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    assert tensors(engine.output) == {"logits": ("TYPE_FP32", [3])}
    assert engine.HasField("dynamic_batching") and engine.version_policy.latest.num_versions == 1
    assert [(g.kind, g.count) for g in engine.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 1)]
    assert engine.parameters["intra_op_thread_count"].string_value == "2"
    (warmup,) = engine.model_warmup
    assert warmup.batch_size == 1
    assert {n: list(given.dims) for n, given in warmup.inputs.items()} == {n: [16] for n in warmup.inputs}
    mask = tmp_path / "repo" / "sst_engine" / "warmup" / warmup.inputs["attention_mask"].input_data_file
    assert np.fromfile(mask, np.int64).tolist() == [1] * 16
    version = tmp_path / "repo" / "sst_engine" / "1"
    assert (version / "model.onnx" / "model.onnx").is_file() and engine.default_model_filename == "model.onnx"
    weights = {path.name: path.stat().st_size for path in bert.model.parent.iterdir()}
    assert {path.name: path.stat().st_size for path in (version / "model.onnx").iterdir()} == weights
    assert not engine.model_operations.op_library_filename
    assert (front.backend, front.max_batch_size) == ("python", 8)
    assert tensors(front.input) == {"TEXT": ("TYPE_STRING", [1]), "TEXT_PAIR": ("TYPE_STRING", [1])}
    assert [each.name for each in front.input if each.optional] == ["TEXT_PAIR"]
    assert tensors(front.output) == {"LABEL": ("TYPE_STRING", [1]), "PROBABILITIES": ("TYPE_FP32", [3])}
    assert front.HasField("dynamic_batching") and not front.model_transaction_policy.decoupled
    assert not [path for path in (tmp_path / "repo").rglob("*") if path.is_symlink()]


def test_a_model_in_one_file_stays_one(bert: Build, tmp_path: Path) -> None:
    build = altered(bert, tmp_path / "build")
    onnx.save(onnx.load(str(build.model)), build.model)
    for path in build.model.parent.iterdir():
        if path != build.model:
            path.unlink()
    seal(build.path, files=listed(build.path))
    found = package_triton(open_build(build.path), tmp_path / "repo")
    assert (found.path / "build_engine" / "1" / "model.onnx").is_file()


def test_without_a_tokenizer_there_are_tensors_alone(tmp_path: Path) -> None:
    source = tiny.model(tmp_path / "m.onnx")
    build = compile_model(source, {"passes": [], "threads": 1, "workload": WORKLOAD}, tmp_path / "build")
    found = package_triton(build, tmp_path / "repo")
    assert found.models == ("build_engine",) and found.why == "the build has no tokenizer"
    assert [path.name for path in found.path.iterdir()] == ["build_engine"]


def test_the_dialect_brings_its_library(bert: Build, tmp_path: Path) -> None:
    if library_path() is None:
        pytest.skip("trimtab was installed without a C++ compiler")
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "\n".join(" ".join(f"w{i}" for i in np.random.default_rng(j).integers(4, 100, 12)) for j in range(30))
    )
    recipe = {
        "passes": [{"ffn-topk": {"density": 0.2, "take": 0.4, "rank": 8, "dense_above": 1}}], "threads": 1,
        "workload": WORKLOAD,
    }  # fmt: skip
    source = triton_server.exported("bert", tmp_path / "model")
    build = compile_model(source, recipe, tmp_path / "build", data=texts)
    found = package_triton(build, tmp_path / "repo", mounted_at="/models")
    (library,) = config(found.path / "build_engine").model_operations.op_library_filename
    assert library == "/models/build_engine/1/trimtab_ops.so"
    assert (found.path / "build_engine" / "1" / "trimtab_ops.so").is_file()
    found = package_triton(build, tmp_path / "here")
    (library,) = config(found.path / "build_engine").model_operations.op_library_filename
    assert Path(library).is_file() and Path(library).is_absolute()
    found = package_triton(build, tmp_path / "python", backend="python")
    told = json.loads((found.path / "build_engine" / "1" / "served.json").read_text())
    assert (found.path / "build_engine" / "1" / told["library"]).is_file()


def test_tensorrt_backend(bert: Build, tmp_path: Path) -> None:
    build = with_engines(bert, tmp_path / "build", (IDS, {"logits": [-1, 3]}))
    found = package_triton(build, tmp_path / "repo", batch=4)
    assert found.models == ("build", "build_engine") and found.backend == "tensorrt"
    engine, front = config(found.path / "build_engine"), config(found.path / "build")
    assert (engine.backend, engine.default_model_filename, engine.max_batch_size) == ("tensorrt", "model.plan", 4)
    assert (found.path / "build_engine" / "1" / "model.plan").read_bytes() == b"engine 0.engine"
    assert tensors(engine.input) == dict.fromkeys(IDS, ("TYPE_INT64", [-1])) and engine.HasField("dynamic_batching")
    assert tensors(engine.output) == {"logits": ("TYPE_FP32", [3])}
    assert engine.parameters["trimtab.version"].string_value == "11.1.0"
    assert list(engine.model_warmup[0].inputs["input_ids"].dims) == [16]
    assert engine.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert front.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU and front.instance_group[0].count == 2
    told = json.loads((found.path / "build" / "1" / "served.json").read_text())
    assert told["session"] is None and told["engine"] == "build_engine"
    assert told["tokens"] == [4, 32] and told["least_batch"] == 1  # the profile's, which the front fills up to


def test_several_engines_run_as_an_ensemble(bert: Build, tmp_path: Path) -> None:
    first = ({"input_ids": [-1, -1], "token_type_ids": [-1, -1]}, {"h": [-1, -1, 48]})
    second = ({"h": [-1, -1, 48], "attention_mask": [-1, -1]}, {"logits": [-1, 3]})
    found = package_triton(with_engines(bert, tmp_path / "build", first, second), tmp_path / "repo")
    whole = config(found.path / "build_engine")
    assert whole.platform == "ensemble" and not whole.backend and not whole.instance_group
    assert whole.max_batch_size == 8 and (found.path / "build_engine" / "1").is_dir()
    steps = whole.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["build_engine_0", "build_engine_1"]
    assert dict(steps[0].output_map) == {"h": "h"} and set(steps[1].input_map) == {"h", "attention_mask"}
    assert tensors(whole.input) == dict.fromkeys(IDS, ("TYPE_INT64", [-1]))
    for number in (0, 1):
        model = config(found.path / f"build_engine_{number}")
        assert model.backend == "tensorrt" and model.max_batch_size == 8
        plan = found.path / model.name / "1" / "model.plan"
        assert plan.read_bytes() == f"engine {number}.engine".encode()


def test_engines_whose_tensors_are_not_all_batched_are_joined_by_none(bert: Build, tmp_path: Path) -> None:
    first = ({"input_ids": [-1, -1], "token_type_ids": [-1, -1]}, {"h": [-1, -1, 48], "size": [1]})
    second = ({"h": [-1, -1, 48], "attention_mask": [-1, -1], "size": [1]}, {"logits": [-1, 3]})
    found = package_triton(with_engines(bert, tmp_path / "build", first, second), tmp_path / "repo")
    for name in ("build_engine", "build_engine_0", "build_engine_1"):
        model = config(found.path / name)
        assert model.max_batch_size == 0 and not model.HasField("dynamic_batching")
    assert tensors(model.input)["h"] == ("TYPE_FP32", [-1, -1, 48])
    assert list(model.model_warmup[0].inputs["h"].dims) == [4, 16, 48]
    assert config(found.path / "build").max_batch_size == 8  # texts are joined in front all the same


def test_generation(llama: Build, tmp_path: Path) -> None:
    found = package_triton(llama, tmp_path / "repo", name="llama", environment="/envs/py.tar.gz")
    assert found.models == ("llama",) and found.kind == "text"
    model = config(found.path / "llama")
    assert model.backend == "python" and model.model_transaction_policy.decoupled
    assert model.parameters["EXECUTION_ENV_PATH"].string_value == "/envs/py.tar.gz"
    optional = {tensor.name: tensor.optional for tensor in model.input}
    assert not optional.pop("text_input") and all(optional.values())
    assert tensors(model.input)["stop"] == ("TYPE_STRING", [-1])
    told = json.loads((found.path / "llama" / "1" / "served.json").read_text())
    assert told["cache"] == {"in_place": True, "head_dim": 16}


def test_a_fixed_batch_is_left_to_the_client(tmp_path: Path) -> None:
    fixed = TensorInfo(name="x", dtype="float16", shape=(2, None, 3))
    plain = TensorInfo(name="n", dtype="bool", shape=("batch",))
    found = model_config("m", "onnxruntime", [fixed], [fixed], batch=0, gpu=True, instances=3)
    assert tensors(found.input) == {"x": ("TYPE_FP16", [2, -1, 3])} and not found.HasField("dynamic_batching")
    assert (found.instance_group[0].kind, found.instance_group[0].count) == (pb.ModelInstanceGroup.KIND_GPU, 3)
    found = model_config("m", "onnxruntime", [plain], [plain], batch=5)
    assert tensors(found.input) == {"n": ("TYPE_BOOL", [1])} and found.input[0].HasField("reshape")
    with pytest.raises(ModelError, match="float8"):
        model_config("m", "python", [TensorInfo(name="x", dtype="float8_e4m3fn", shape=(1,))], [], batch=0)


@pytest.mark.parametrize("model", CARRIED)
def test_carried_code_imports_without_trimtab(model: str, tmp_path: Path) -> None:
    write_code(model, tmp_path)
    (tmp_path / "triton_python_backend_utils.py").touch()
    site = next(path for path in sys.path if path.endswith("site-packages"))
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.path.append({site!r}); import model; "
        "print(model.TritonPythonModel); "
        "heavy = [name for name in sys.modules if name in ('onnx', 'scipy', 'torch', 'onnx_graphsurgeon')]; "
        "assert not heavy, heavy; assert all(str(m.__file__).startswith(sys.path[0]) "
        "for n, m in sys.modules.items() if n.startswith('trimtab'))"
    )
    # -S: no .pth file, by which an editable install would be found
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("changes", "options", "error", "says"),
    [
        ({"shards": 2}, {}, ModelError, "2 shards"),
        ({"target": "tensorrt-rtx"}, {}, TargetError, "TensorRT-RTX"),
        ({}, {"backend": "tensorrt"}, TargetError, "was built for onnxruntime"),
        ({}, {"backend": "openvino"}, BuildError, "onnxruntime, python, tensorrt"),
        ({}, {"batch": 9}, BuildError, "1 to 8"),
        ({}, {"name": "..."}, BuildError, "not a valid name"),
    ],
)
def test_what_triton_does_not_serve(
    bert: Build, tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    build = replace(bert, manifest=bert.manifest.model_copy(update=changes))
    with pytest.raises(error, match=says):
        package_triton(build, tmp_path / "out" / "repo", **options)
    assert not (tmp_path / "out").exists()


def test_an_ensemble_lets_no_sample_leave(bert: Build, tmp_path: Path) -> None:
    (tmp_path / "build" / "engine").mkdir(parents=True)
    exits = {"points": [{"after": 0, "stays": "s", "outputs": {"logits": "early"}}]}
    info = {
        "target": "tensorrt",
        "library": "tensorrt",
        "version": "1",
        "precisions": [],
        "engines": [],
        "exits": exits,
    }
    (tmp_path / "build" / "engine" / "engine.json").write_text(json.dumps(info))
    manifest = bert.manifest.model_copy(update={"target": "tensorrt"})
    with pytest.raises(TargetError, match=r"samples leave between its engines.*engine: {segments: 1}"):
        package_triton(replace(bert, path=tmp_path / "build", manifest=manifest), tmp_path / "repo")


def test_whole_or_not_at_all(llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    done = cli("package", llama.path, "--triton", tmp_path / "there")
    assert done.exit_code == 1 and "exists already" in done.stderr
    shutil.copytree(llama.path, tmp_path / "build")
    shutil.rmtree(tmp_path / "build" / "tokenizer")
    seal(tmp_path / "build", files=listed(tmp_path / "build"))
    done = cli("package", tmp_path / "build", "--triton", tmp_path / "repo")
    assert done.exit_code == 1 and "no tokenizer" in done.stderr
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BuildError, match="No space left"):
        package_triton(llama, tmp_path / "repo")
    assert sorted(os.listdir(tmp_path)) == ["build", "there"]
    for words in ([], ["--genai", tmp_path / "a", "--triton", tmp_path / "b"]):
        done = cli("package", llama.path, *words)
        assert done.exit_code == 2 and "one of --genai and --triton" in done.stderr


@pytest.mark.parametrize("name", ["../x", "a/b", "é", "..", " "])
def test_names_that_triton_does_not_take(bert: Build, tmp_path: Path, name: str) -> None:
    done = cli("package", bert.path, "--triton", tmp_path / "repository", "--name", name)
    assert done.exit_code == 1 and "is not a valid name" in done.stderr
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("option", ["--triton", "--genai"])
def test_nothing_is_written_into_a_build(llama: Build, option: str) -> None:
    done = cli("package", llama.path, option, llama.path / "model" / "inside")
    assert done.exit_code == 1 and "lies inside the build" in done.stderr
    assert not (llama.path / "model" / "inside").exists()


def test_outputs_along_another_dimension_are_not_joined() -> None:
    def info(first: str | None) -> TensorInfo:
        return TensorInfo(name="x", dtype="float32", shape=(first, 4))

    assert is_batched([info("batch"), info("batch")])
    assert not is_batched([info("batch"), info("boxes")]) and not is_batched([info(None), info(None)])
