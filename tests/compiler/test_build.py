"""Build directories: whole or not at all, one writer at a time, nothing foreign overwritten, damage found."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from sealed import seal

from trimtab.compiler.builds import build as build_module
from trimtab.compiler.builds import manifest as manifest_module
from trimtab.compiler.builds import writer as writer_module
from trimtab.compiler.builds.build import Build, find_build, open_build, read_build, sibling
from trimtab.compiler.builds.manifest import HASH, NAME, Manifest, SelfCheck, Sizes
from trimtab.compiler.builds.writer import BuildWriter, record
from trimtab.compiler.recipe import Recipe
from trimtab.passes.errors import BuildError


def manifest(**changes: Any) -> Manifest:
    base: dict[str, Any] = {
        "key": "k", "created": "2030-01-01T00:00:00+00:00", "origin": "model", "source": "/m.onnx", "graph": "g",
        "fingerprint": "f", "family": "bert", "inputs": (), "outputs": (), "target": "onnxruntime", "capability": {},
        "recipe": Recipe(passes=()).model_dump(mode="json"), "versions": {"trimtab": "0"}, "passes": (), "seconds": {},
        "sizes": Sizes(dense_bytes=2, compiled_bytes=1, dense_ffn_bytes=1), "check": SelfCheck(ran=False, why="a test"),
    }  # fmt: skip
    return Manifest(**base | changes)


def write(out: Path, text: str = "weights", **changes: Any) -> Build:
    """A build whose model, an ONNX file of no nodes, has `text` for its description."""
    with BuildWriter(out) as writer:
        (writer.folder / "model").mkdir()
        (writer.folder / "model" / "model.onnx").write_bytes(onnx.ModelProto(doc_string=text).SerializeToString())
        return writer.commit(manifest(**changes))


def text_of(build: Build) -> str:
    return str(onnx.load(str(build.model)).doc_string)


def around(out: Path) -> list[str]:
    """What lies in the folder of `out`, hidden or not."""
    return sorted(path.name for path in out.parent.iterdir())


def test_a_build_is_found_again_as_it_was_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "build"
    write(out)
    found = open_build(out)
    assert text_of(found) == "weights"
    assert found.manifest.files["model/model.onnx"].bytes == found.model.stat().st_size
    assert set(found.manifest.files) == {"model/model.onnx"}
    assert subprocess.run(["sha256sum", "--check", HASH], cwd=out, stdout=subprocess.DEVNULL).returncode == 0
    assert around(out) == ["build"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_after_an_error_all_is_as_it_was(tmp_path: Path, error: BaseException) -> None:
    fresh, old = tmp_path / "a" / "b" / "build", tmp_path / "old"
    write(old, "old")
    for out in (fresh, old):
        with pytest.raises(type(error)), BuildWriter(out) as writer:
            (writer.folder / "half").write_text("half")
            raise error
    assert around(old) == ["old"]
    assert text_of(open_build(old)) == "old"


def test_leaving_without_a_commit_writes_nothing(tmp_path: Path) -> None:
    with BuildWriter(tmp_path / "build"):
        pass
    assert around(tmp_path / "build") == []


def test_a_build_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "build"
    write(out, "old")
    (out / "model" / "stray").write_text("stray")
    write(out, "new")
    assert text_of(open_build(out)) == "new"
    assert not (out / "model" / "stray").exists()
    assert around(out) == ["build"]


def test_a_link_keeps_pointing_at_the_build(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("build")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_build(tmp_path / "build").model.is_file()


@pytest.mark.parametrize("inside", ["notes.txt", NAME])
def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, inside: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / inside).write_text('{"name": "my web application"}')
    with pytest.raises(BuildError, match="not a build"):
        write(out)
    assert (out / inside).read_text() == '{"name": "my web application"}'
    assert around(out) == ["mine"]


def test_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BuildError, match="not a directory"):
        write(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    write(tmp_path / "build")
    assert open_build(tmp_path / "build").model.is_file()


@pytest.mark.parametrize("where", ["file/build", "file/deep/build", "/proc/build", "/proc/deep/build", "/"])
def test_where_nothing_can_be_written(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BuildError, match=r"cannot write the build|is the root") as caught:
        write(tmp_path / where)
    assert caught.value.hint
    assert around(tmp_path / "file") == ["file"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "build", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BuildError, match="No space left") as caught:
        write(tmp_path / "build", "new")
    assert "free some space" in str(caught.value)
    assert around(tmp_path / "build") == ["build"]
    assert text_of(open_build(tmp_path / "build")) == "old"


def test_a_file_that_is_only_read_is_not_blamed_on_the_build(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "build"
    with BuildWriter(out) as writer:
        for path in (tmp_path / "model.onnx", tmp_path / "deep" / "model.onnx"):
            with pytest.raises(BuildError, match=rf"{path}: cannot be read \(No such file") as caught, writer.writing():
                path.read_bytes()
            assert "path is right" in str(caught.value.hint)
        for path in (writer.folder / "no" / "model.onnx", out / "model.onnx"):
            with pytest.raises(BuildError, match=r"build: cannot write the build"), writer.writing():
                path.read_bytes()


def other_process(code: str, out: Path) -> subprocess.Popen[str]:
    """A process that enters a BuildWriter of `out`, says so, and then runs `code`."""
    script = f"""
        import sys
        from trimtab.compiler.builds.writer import BuildWriter
        with BuildWriter(sys.argv[1]) as writer:
            (writer.folder / "half").write_text("half")
            print("in", flush=True)
            {code}
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_one_process_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "build"
    other = other_process("sys.stdin.read()", out)
    with pytest.raises(BuildError, match="another process is writing"):
        write(out)
    other.communicate("")
    assert around(out) == []
    write(out)
    assert around(out) == ["build"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    out = tmp_path / "build"
    other = other_process("sys.stdin.read()", out)
    other.kill()
    other.wait()
    assert len(around(out)) == 2  # the unfinished build and its lock
    write(out)
    assert around(out) == ["build"]
    assert set(open_build(out).manifest.files) == {"model/model.onnx"}


def test_a_process_killed_between_the_two_renames(tmp_path: Path) -> None:
    out = tmp_path / "build"
    write(out, "old")
    out.rename(sibling(out, "old"))
    with pytest.raises(ValueError, match="later"), BuildWriter(out):
        raise ValueError("later")
    assert text_of(open_build(out)) == "old"
    assert around(out) == ["build"]


def test_what_is_measured_leaves_the_build_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "build"
    write(out)
    before = open_build(out)
    record(open_build(out), quality={"accuracy": 0.9})
    record(open_build(out), speed={"runs": [{"name": "dense", "median_ms": 2.5}]})
    assert open_build(out, trusted_hash=before.hash) == before
    found = before.measured
    assert found.quality == {"accuracy": 0.9}
    assert found.speed["runs"][0]["median_ms"] == 2.5
    report = (out / "report.md").read_text()
    assert "| accuracy | 0.9 |" in report
    assert "| dense | 2.5 |" in report
    assert around(out) == ["build"]


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_damaged_file_is_named(tmp_path: Path, size: str) -> None:
    write(tmp_path / "build")
    path = tmp_path / "build" / "model" / "model.onnx"
    path.write_bytes(path.read_bytes().replace(b"weights", b"wEights" if size == "same" else b"w"))
    with pytest.raises(BuildError, match=r"model/model\.onnx: damaged"):
        open_build(tmp_path / "build")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "build")
    (tmp_path / "build" / "model" / "model.onnx").unlink()
    with pytest.raises(BuildError, match=r"model/model\.onnx: missing"):
        open_build(tmp_path / "build")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "format 99"),
        ({"fingerprint": 3}, "damaged"),
        ({"surprise": 1}, "damaged"),
        ({"tool": "other"}, "damaged"),
        ({"versions": {"tramtib": "1"}}, "versions: lacks 'trimtab'"),
        ({"inputs": [{"name": "x", "dtype": "{}", "shape": [1]}]}, r"inputs\[0\].dtype: '{}' is no type"),
        ({"outputs": [{"name": "x", "dtype": "f4", "shape": [1]}]}, r"outputs\[0\].dtype: 'f4' is no type"),
        ({"files": {"../x": {"sha256": "", "bytes": 0}}}, "outside the build"),
        ({"files": {"/etc/passwd": {"sha256": "", "bytes": 0}}}, "outside the build"),
        ({"files": {"model//model.onnx": {"sha256": "", "bytes": 0}}}, "outside the build"),
    ],
)
def test_manifests_that_cannot_be_trusted(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    write(tmp_path / "build")
    seal(tmp_path / "build", **change)
    with pytest.raises(BuildError, match=said):
        open_build(tmp_path / "build")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "build").path
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(BuildError, match=f"{name}: damaged: it is no regular file"):
        open_build(path)
    if name == NAME:
        with pytest.raises(BuildError, match="exists and is not a build"):
            write(path)


@pytest.mark.parametrize("inner", ["sub", "model/sub", "a/b/c"])
def test_a_build_inside_a_build_is_refused(tmp_path: Path, inner: str) -> None:
    """The next compile of the outer one would remove it, without a word."""
    outer = write(tmp_path / "build")
    (tmp_path / "link").symlink_to(outer.path)
    for place in (outer.path, tmp_path / "link"):
        with pytest.raises(BuildError, match="lies inside the build "):
            write(place / inner)
    assert open_build(outer.path).hash == outer.hash and not (outer.path / inner).exists()
    assert sorted(path.name for path in outer.path.iterdir() if path.name.startswith(".")) == []


def test_no_build(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no build")
    with pytest.raises(BuildError, match="file: is a file, not a build directory"):
        open_build(tmp_path / "file")
    with pytest.raises(BuildError, match="no such build directory"):
        open_build(tmp_path / "none")
    with pytest.raises(BuildError, match="not a build"):
        open_build(tmp_path)
    write(tmp_path / "build")
    (tmp_path / "build" / NAME).write_text("{")
    with pytest.raises(BuildError, match="damaged"):
        open_build(tmp_path / "build")


def test_only_a_sound_build_of_the_same_inputs_is_reused(tmp_path: Path) -> None:
    out = tmp_path / "build"
    assert find_build(out, "k") is None
    write(out, key="k")
    found = find_build(out, "k")
    assert found is not None
    assert found.reused
    assert find_build(out, "other") is None
    (out / "model" / "model.onnx").write_text("damaged")
    assert find_build(out, "k") is None


def test_other_code_is_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "import_module", lambda name: SimpleNamespace(__path__=[str(tmp_path)]))
    found = []
    for code in ("x = 1\n", "x = 2\n", "x = 1\n"):
        (tmp_path / "a.py").write_text(code)
        manifest_module._version.cache_clear()
        found.append(manifest_module.package_versions()["trimtab"])
    manifest_module._version.cache_clear()
    assert found[0] == found[2] != found[1]


def test_numbers_of_another_build_do_not_count(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", "a"), write(tmp_path / "b", "b")
    record(first, quality={"accuracy": 0.9})
    (second.path / "measured.json").write_bytes((first.path / "measured.json").read_bytes())
    assert second.measured.quality == {}
    (second.path / "measured.json").write_text("{")
    assert second.measured.quality == {}
    record(second, speed={"ms": 1})
    assert (second.measured.quality, second.measured.speed) == ({}, {"ms": 1})


def test_numbers_of_a_build_that_was_replaced_are_not_recorded(tmp_path: Path) -> None:
    old = write(tmp_path / "build", "old")
    new = write(tmp_path / "build", "new")
    with pytest.raises(BuildError, match="another process has replaced"):
        record(old, quality={"accuracy": 0.9})
    assert new.measured.quality == {}
    assert around(tmp_path / "build") == ["build"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_the_name_has_a_build_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """Readers meet builds alone; where the system cannot exchange names, they wait for the one that is absent."""
    if not exchanges:
        monkeypatch.setattr(writer_module, "exchange", lambda first, second: False)
    monkeypatch.setattr(build_module, "_ATTEMPTS", 10**6)  # on a busy machine, a reader may be slower than the writer
    monkeypatch.setattr(build_module, "_ABSENT_S", 60.0)
    out, read, done = tmp_path / "build", [], threading.Event()
    write(out, "0")

    def reader() -> None:
        while not done.is_set():
            read.append(int(read_build(out, text_of)))

    def absent() -> None:
        while not done.is_set():
            gone.append(not out.exists())

    gone: list[bool] = []
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(reader), pool.submit(reader), *([pool.submit(absent)] if exchanges else [])]
        for number in range(1, 30):
            write(out, str(number))
        done.set()
        for future in futures:
            future.result()
    assert not any(gone)
    assert read and max(read) > 0
    assert around(out) == ["build"]


def test_readers_say_that_a_compile_was_ended_between_its_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "_ABSENT_S", 0.05)
    out = tmp_path / "build"
    write(out, "old")
    out.rename(sibling(out, "old"))
    with pytest.raises(BuildError, match="absent, because a compile ended"):
        open_build(out)
    write(out, "new")
    assert text_of(open_build(out)) == "new"


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_build_of_read_only_folders_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(writer_module, "exchange", lambda first, second: False)
    out = tmp_path / "build"
    write(out, "old")
    for folder in (out / "model", out):
        folder.chmod(0o555)
    for text in ("new", "newer"):
        write(out, text)
        assert text_of(open_build(out)) == text
        assert around(out) == ["build"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_process_killed_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool) -> None:
    """The build is one of those that were written, and the next writer clears away what was left."""
    if not exchanges:
        monkeypatch.setattr(writer_module, "exchange", lambda first, second: False)
    monkeypatch.setattr(build_module, "_ABSENT_S", 0.0)
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")
    rng, out = random.Random(seed), tmp_path / "build"
    write(out, "0")
    for _ in range(20):
        child = os.fork()
        if child == 0:
            try:
                for number in range(1000):
                    write(out, str(number))
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if exchanges or out.exists():
            assert text_of(open_build(out)).isdecimal()
        if rng.random() < 0.3:
            with BuildWriter(out):
                assert text_of(open_build(out)).isdecimal()
            assert around(out) == ["build"]
    write(out, "1")
    assert around(out) == ["build"]
