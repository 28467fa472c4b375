"""What is loaded while another process replaces the build: one of the two, wholly, or an error that says so."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import zoo
from switched import at_open, listening, put, variant

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds import build as build_module
from trimtab.compiler.builds import writer as writer_module
from trimtab.compiler.builds.build import Build, of_one_build, open_build, unchanged
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.engine import Engine
from trimtab.compiler.generation import generate
from trimtab.compiler.packaging.genai import package_genai
from trimtab.compiler.sources import Source
from trimtab.passes.errors import BuildError

RECIPE: dict[str, Any] = {"passes": [], "threads": 1, "workload": {"batch": [1, 2, 2], "tokens": [1, 8, 16]}}


def built(kind: str, folder: Path) -> Build:
    """A build of one of the kinds that are loaded in different ways."""
    if kind == "plain":
        return compile_model(tiny.model(folder / "model.onnx"), RECIPE, folder / "build")
    if kind == "texts":
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        zoo._tokenizer(tiny.ROWS).save_pretrained(tokenizer)
        model = tiny.model(folder / "model.onnx", external=True)
        source = Source(origin="tiny", onnx=model, tokenizer=tokenizer, labels=None, max_tokens=16, kind="onnx")
        return compile_model(source, RECIPE, folder / "build")
    model = zoo.save_pretrained("llama", folder / "model")
    return compile_model(model, RECIPE, folder / "build", shards=2 if kind == "shards" else 1)


@pytest.fixture(scope="module", params=["plain", "texts", "decoder"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Build, Build]:
    folder = tmp_path_factory.mktemp(request.param)
    first = built(request.param, folder)
    return first, variant(first, folder / "variant")


def answers(engine: Engine) -> list[np.ndarray]:
    """What tells the graph, the weights, the tokenizer and the cache of one build from those of another."""
    found = []
    if any(name.startswith("past") for name in engine.runner.inputs):
        steps = engine.runner.steps(1, 8)
        found.append(steps.run(np.array([[5, 6]]), np.ones((1, 2), np.int64)))
        found.append(np.stack(list(generate(engine.runner, [[7, 8, 9]], max_new_tokens=4))))
    else:
        found += list(engine.run({"input_ids": np.arange(1, 9).reshape(1, 8)}).values())
    if engine._tokenizer is not None:
        found += [np.array(engine.tokenizer.prompts(["w3 w5 w7"]))]
    return found


def check(engine: Engine, pair: tuple[Build, Build], wanted: dict[str, list[np.ndarray]]) -> None:
    """That all answers of `engine` are those of the build whose manifest it has."""
    key = engine.manifest.key
    for ours, theirs in zip(answers(engine), wanted[key], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [build.manifest for build in pair if build.manifest.key == key] == [engine.manifest]


def expected(pair: tuple[Build, Build]) -> dict[str, list[np.ndarray]]:
    wanted = {build.manifest.key: answers(load(build.path)) for build in pair}
    first, second = wanted.values()
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    return wanted


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_switch_at_any_file_that_is_opened(
    pair: tuple[Build, Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(writer_module, "exchange", lambda first, second: False)
    out, wanted, seen = tmp_path / "out", expected(pair), set()
    number, opened = 0, [""]
    while len(opened) >= number:
        number += 1
        put(out, pair[0])
        with at_open(number, out, lambda: put(out, pair[1])) as opened:
            engine = load(out)
            check(engine, pair, wanted)  # with all that may be read later
        seen.add(engine.manifest.key)
    assert number > 7
    assert seen == wanted.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_switches_at_any_time(pair: tuple[Build, Build], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_ATTEMPTS", 10**6)  # on a busy machine, switches are faster than loads
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    rng, out, wanted = np.random.default_rng(seed), tmp_path / "out", expected(pair)
    put(out, pair[0])
    done = threading.Event()

    def replace() -> None:
        number = 0
        while not done.is_set():
            number += 1
            put(out, pair[number % 2])
            done.wait(rng.uniform(0, 0.1))

    replacing = threading.Thread(target=replace)
    replacing.start()
    try:
        for _ in range(25):
            check(load(out), pair, wanted)
    finally:
        done.set()
        replacing.join()


def test_a_loaded_engine_needs_its_build_no_more(pair: tuple[Build, Build], tmp_path: Path) -> None:
    wanted = expected(pair)
    put(tmp_path / "out", pair[0])
    engine = load(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    check(engine, pair, wanted)


def test_a_build_that_is_replaced_without_end(pair: tuple[Build, Build], tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out, pair[0])
    turns: Iterator[int] = iter(range(1, 1000))

    def listener(event: str, path: str) -> None:
        if path == str(out / "model" / "model.onnx"):
            put(out, pair[next(turns) % 2])

    with listening(listener), pytest.raises(BuildError, match="replaced the build 10 times while it was loaded"):
        load(out)


def test_a_file_that_changes_in_place(pair: tuple[Build, Build], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("model/model.onnx.data", "model/model.onnx"):
        put(out, pair[0])
        with at_open(10**6, out, lambda: None) as opened:
            load(out)
        last = len(opened) - opened[::-1].index(str(out / "model" / "model.onnx"))  # ONNX Runtime opens it next
        put(out, pair[0])
        other = (pair[1].path / name).read_bytes()
        with at_open(last, out, lambda: (out / name).write_bytes(other)), pytest.raises(BuildError) as caught:  # noqa: B023
            load(out)
        assert str(caught.value).startswith(str(out / name)) and "changed while the build was loaded" in str(
            caught.value
        )


def test_errors_are_of_the_build_that_is_there(pair: tuple[Build, Build], tmp_path: Path) -> None:
    """What a reader runs into in a build that is gone by then does not count; the same in one that is there does."""
    put(tmp_path / "out", pair[0])
    build = open_build(tmp_path / "out")

    @of_one_build
    def read(build: Build, replaced: bool) -> None:
        if replaced:
            put(build.path, pair[1])
        raise OSError("a file is missing")

    with pytest.raises(OSError, match="a file is missing"):
        read(build, False)
    with pytest.raises(BuildError, match="another process has replaced the build"):
        read(build, True)
    with pytest.raises(BuildError, match="another process has replaced the build"), unchanged(build.path, build.hash):
        pytest.fail("it is replaced already")


def test_numbers_are_of_one_build(tmp_path: Path) -> None:
    kept = built("plain", tmp_path)
    other, out = variant(kept, tmp_path / "variant"), tmp_path / "out"
    put(out, kept)
    with pytest.raises(BuildError, match="another process has replaced the build"):
        validate(open_build(out), progress=lambda what, done, total: put(out, other) if not done else None)
    assert open_build(out).hash == other.hash
    assert open_build(out).measured.quality == {}
    validate(open_build(out))
    assert open_build(out).measured.quality["outputs"]
    assert "relative_l2" in (out / "report.md").read_text()


def test_packages_are_of_one_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = built("decoder", tmp_path)
    other, out, copy = variant(kept, tmp_path / "variant"), tmp_path / "out", shutil.copyfile
    put(out, kept)
    opened = open_build(out)
    for replaced in (False, True):

        def copyfile(source: Path, target: Path) -> Any:
            if Path(source).name == "model.onnx" and out in Path(source).parents and replaced:  # noqa: B023
                put(out, other)
            return copy(source, target)

        monkeypatch.setattr(shutil, "copyfile", copyfile)
        if not replaced:
            packed = package_genai(opened, tmp_path / "genai")
            assert (packed / "model.onnx.data").read_bytes() == kept.model.with_name("model.onnx.data").read_bytes()
        else:
            with pytest.raises(BuildError, match="another process has replaced the build"):
                package_genai(opened, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_shards_are_of_one_build(tmp_path: Path) -> None:
    """The other ranks read it in processes of their own, and again when they are started anew."""
    kept = built("shards", tmp_path)
    pair = kept, variant(kept, tmp_path / "variant")
    out, starts = tmp_path / "out", 0
    put(out, pair[0])

    def listener(event: str, path: str) -> None:
        nonlocal starts
        if event == "subprocess.Popen":
            starts += 1
            if starts == 1:
                put(out, pair[1])

    with listening(listener):
        engine = load(out, threads=1)
    assert (starts, engine.manifest) == (2, pair[1].manifest)
    whole = load(pair[1].path, threads=1)
    feeds: dict[str, np.ndarray] = {}
    for tensor in engine.inputs:
        sizes = [n if isinstance(n, int) else {"batch": 1, "past": 0}.get(str(n), 3) for n in tensor.shape or ()]
        feeds[tensor.name] = np.ones(sizes, tensor.dtype)
    np.testing.assert_array_equal(engine.run(feeds)["logits"], whole.run(feeds)["logits"])
    whole.close()
    put(out, pair[0])
    for worker in engine.runner._crew._workers.values():  # type: ignore[attr-defined]
        worker.kill()
    with pytest.raises(Exception, match="rank 1 was ended"):
        engine.run(feeds)
    with pytest.raises(BuildError, match="another process has replaced the build that was loaded; load it again"):
        engine.run(feeds)
    engine.close()
    with pytest.raises(Exception, match="closed"):
        engine.run(feeds)
