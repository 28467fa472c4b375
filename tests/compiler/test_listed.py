"""Only what a manifest lists is opened, and a manifest is the one whose hash is trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import zoo
from sealed import entry, listed, seal
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.builds.manifest import HASH, NAME
from trimtab.compiler.cli.app import app
from trimtab.compiler.sources import Source
from trimtab.compiler.targets.tensorrt.info import EngineFile
from trimtab.passes.errors import BuildError

FEEDS = {"input_ids": np.arange(1, 9).reshape(2, 4)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("listed")
    (folder / "tokenizer").mkdir()
    zoo._tokenizer(tiny.ROWS).save_pretrained(folder / "tokenizer")
    model = tiny.model(folder / "model.onnx")
    source = Source(origin="tiny", onnx=model, tokenizer=folder / "tokenizer", labels=None, max_tokens=16, kind="onnx")
    return compile_model(source, {"passes": [], "threads": 1}, folder / "build")


@pytest.fixture
def copy(kept: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept.path, tmp_path / "copy"))


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_copy_is_the_same_build(kept: Build, copy: Path) -> None:
    (copy / "README.md").write_text("Notes lie where nothing looks.")
    copied = open_build(copy)
    assert (copied.hash, copied.manifest) == (kept.hash, kept.manifest)
    np.testing.assert_array_equal(
        load(copy).run(FEEDS)["last_hidden_state"], load(kept.path).run(FEEDS)["last_hidden_state"]
    )


STRAY = (
    "model/shards.json", "model/rank0.segment0.onnx", "model/other.data", "model/a/b", "model/.hidden",
    "engine/engine.json", "engine/model.engine", "tokenizer/chat_template.jinja", "tokenizer/config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", STRAY)
@pytest.mark.parametrize("verify", [True, False])
def test_a_stray_file_is_refused_by_its_name(copy: Path, name: str, verify: bool) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text(json.dumps({"shards": 1, "inputs": [], "outputs": [], "segments": [[]]}))
    with pytest.raises(BuildError, match="the manifest does not list it") as caught:
        load(copy, verify=verify)
    assert str(copy / name) in str(caught.value)
    (copy / name).unlink()
    (copy / name).symlink_to("nowhere")
    with pytest.raises(BuildError, match="the manifest does not list it"):
        load(copy, verify=verify)


def test_a_linked_folder_is_refused(copy: Path) -> None:
    (copy.parent / "elsewhere").mkdir()
    (copy / "model" / "more").symlink_to(copy.parent / "elsewhere")
    with pytest.raises(BuildError, match=r"model/more: does not belong to this build"):
        load(copy)


@pytest.mark.parametrize(
    "name", ["model/model.onnx", "model/model.onnx.data", "tokenizer/tokenizer.json", "recipe.yaml"]
)
def test_links_that_lead_out_of_the_build(copy: Path, name: str) -> None:
    outside = copy.parent / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(BuildError, match="is a link that leads out of the build") as caught:
        load(copy)
    assert str(copy / name) in str(caught.value) and "cp -rL" in str(caught.value)


def test_a_folder_that_is_a_link(copy: Path) -> None:
    (copy / "model").rename(copy.parent / "model")
    (copy / "model").symlink_to(copy.parent / "model")
    with pytest.raises(BuildError, match="is a link that leads out of the build"):
        load(copy)


def test_a_link_to_the_whole_build(kept: Build, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(kept.path)
    assert load(tmp_path / "current").manifest == kept.manifest


@pytest.mark.parametrize("name", ["model/model.onnx", "model/model.onnx.data"])
@pytest.mark.parametrize("sealed", [True, False])
def test_files_without_an_entry(copy: Path, name: str, sealed: bool) -> None:
    """Their content is altered, and nothing says what it should be."""
    (copy / name).write_bytes((copy / name).read_bytes()[::-1])
    files = {other: info for other, info in listed(copy).items() if other != name}
    if sealed:
        seal(copy, files=files)
    else:
        text = json.loads((copy / NAME).read_text())
        (copy / NAME).write_text(json.dumps(text | {"files": files}))
    with pytest.raises(BuildError, match="list" if sealed else "its sha256 is not that of manifest.sha256"):
        load(copy)
    if sealed:
        (copy / name).unlink()
        with pytest.raises(BuildError, match=f"does not list {name}"):
            load(copy)


def test_no_files_at_all(copy: Path) -> None:
    seal(copy, files={})
    with pytest.raises(BuildError, match=r"does not list model/model\.onnx"):
        load(copy)


def test_weights_that_lie_elsewhere(copy: Path) -> None:
    """The graph is listed, and reads its weights from a file beside the folders that are looked into."""
    model = onnx.load(str(copy / "model" / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for pair in tensor.external_data:
            if pair.key == "location":
                pair.value = "../weights.data"
    (copy / "model" / "model.onnx.data").rename(copy / "weights.data")
    onnx.save(model, copy / "model" / "model.onnx")
    seal(copy, files=listed(copy))
    with pytest.raises(BuildError, match=r"does not list weights\.data, from which model/model\.onnx reads"):
        load(copy)


def test_a_plan_counts_only_where_the_manifest_has_shards(copy: Path) -> None:
    plan = copy / "model" / "shards.json"
    plan.write_text(json.dumps({"shards": 2, "inputs": ["input_ids"], "outputs": ["y"], "segments": [[]]}))
    seal(copy, files=listed(copy) | {"model/shards.json": entry(plan)})
    assert load(copy).run(FEEDS)["last_hidden_state"].shape == (2, 4, tiny.WIDTH)
    seal(copy, files={name: info for name, info in listed(copy).items() if name != "model/shards.json"}, shards=2)
    plan.unlink()
    with pytest.raises(BuildError, match=r"does not list model/shards\.json"):
        load(copy)


@pytest.mark.parametrize("content", ["", "0" * 64 + f"  {NAME}\n", "\xff", None])
def test_the_hash_beside_the_manifest(copy: Path, content: str | None) -> None:
    (copy / HASH).unlink()
    if content is not None:
        (copy / HASH).write_text(content, encoding="latin-1")
    with pytest.raises(BuildError, match=r"missing from the build" if content is None else "damaged") as caught:
        load(copy)
    assert caught.value.hint


def test_any_flipped_byte_of_a_manifest_is_refused(copy: Path) -> None:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    rng, whole = np.random.default_rng(seed), (copy / NAME).read_bytes()
    for place in rng.choice(len(whole), 40, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        (copy / NAME).write_bytes(damaged)
        with pytest.raises(BuildError):
            load(copy)


def test_only_the_trusted_build_is_loaded(kept: Build, copy: Path) -> None:
    for digest in (kept.hash, kept.hash.upper(), f" {kept.hash}\n"):
        assert load(copy, trusted_hash=digest).manifest == kept.manifest
    forged = seal(copy, origin="another")
    assert load(copy).manifest.origin == "another"
    for digest in (kept.hash, "0" * 64, ""):
        with pytest.raises(BuildError, match=f"its sha256 is {forged}, and {digest} is trusted"):
            load(copy, trusted_hash=digest)
    assert open_build(copy, trusted_hash=forged).manifest.origin == "another"


def test_a_trusted_build_is_verified_in_any_case(kept: Build, copy: Path) -> None:
    weights = bytearray((copy / "model" / "model.onnx.data").read_bytes())
    weights[7] ^= 1
    (copy / "model" / "model.onnx.data").write_bytes(weights)
    load(copy, verify=False)
    with pytest.raises(BuildError, match="damaged"):
        load(copy, verify=False, trusted_hash=kept.hash)


@pytest.mark.parametrize(
    "words",
    [
        ["validate"],
        ["bench", "--seconds", "0"],
        ["package", "--genai", "x"],
        ["serve"],
        ["generate", "--prompt", "a"],
    ],
)
def test_commands_take_the_trusted_build_alone(copy: Path, words: list[str]) -> None:
    done = cli(words[0], copy, *words[1:], "--trusted-hash", "0" * 64)
    assert done.exit_code == 1 and "is trusted" in done.stderr and "hint: " in done.stderr


def test_compile_prints_the_hash(tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "model.onnx")
    words = ["compile", model, "-o", tmp_path / "build", "--set", "passes=[]"]
    done, told = cli(*words), cli(*words, "--json")
    digest = open_build(tmp_path / "build").hash
    assert digest in done.stdout
    assert json.loads(told.stdout)["manifest_sha256"] == digest
    assert cli("validate", tmp_path / "build", "--trusted-hash", digest).exit_code == 0


@pytest.mark.parametrize("name", ["../../x.engine", "/etc/passwd", "a/b", ""])
def test_engines_lie_beside_their_description(name: str) -> None:
    with pytest.raises(ValueError, match="file"):
        EngineFile(file=name, inputs=(), outputs=(), profiles=())
