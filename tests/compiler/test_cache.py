"""The cache: entries are whole or made again, by one process at a time; nothing in it is believed unverified."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trimtab.compiler.cache import entry, is_sound, part, updated
from trimtab.compiler.caching.record import record_path
from trimtab.passes.errors import BuildError, ModelError


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes an entry of random bytes, a file or a folder with a file below, and counts."""

    def __init__(self, folder: bool, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.folder, self.made = folder, 0
        self.bytes = {name: rng.bytes(int(rng.integers(1, 3000))) for name in ("graph", "weights/data")}

    def __call__(self, path: Path) -> None:
        assert not path.exists()
        self.made += 1
        if not self.folder:
            path.write_bytes(self.bytes["graph"])
            return
        for name, content in self.bytes.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)

    def check(self, path: Path) -> None:
        """That `path` holds what was made, and nothing else."""
        files = {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}
        expected = {path / name: content for name, content in self.bytes.items()}
        assert files == (expected if self.folder else {path: self.bytes["graph"]})


def flip(file: Path, place: float = 0.5) -> None:
    """One bit, with the file's size and mtime kept."""
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << (len(data) % 8)
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def largest(path: Path) -> Path:
    return max((file for file in [path, *path.rglob("*")] if file.is_file()), key=lambda file: file.stat().st_size)


def replace_by_link(path: Path) -> None:
    file = largest(path)
    file.rename(path.parent.parent / "elsewhere")
    file.symlink_to(path.parent.parent / "elsewhere")


def make_folder(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "first bit": lambda path, record: flip(largest(path), 0),
    "a bit between": lambda path, record: flip(largest(path)),
    "last bit": lambda path, record: flip(largest(path), 1),
    "truncated": lambda path, record: os.truncate(largest(path), largest(path).stat().st_size // 2),
    "empty": lambda path, record: os.truncate(largest(path), 0),
    "longer": lambda path, record: largest(path).write_bytes(largest(path).read_bytes() + b"\0"),
    "a file missing": lambda path, record: largest(path).unlink(),
    "a link": lambda path, record: replace_by_link(path),
    "no record": lambda path, record: record.unlink(),
    "a damaged record": lambda path, record: flip(record),
    "an empty record": lambda path, record: record.write_text(""),
    "another kind of file": lambda path, record: make_folder(path),
}
FOLDERS = {"a file too many": lambda path, record: (path / "weights" / "shards.json").write_text("{}")}


@pytest.mark.parametrize("damage", [*DAMAGE, *FOLDERS])
@pytest.mark.parametrize("folder", [False, True])
def test_a_damaged_entry_is_made_again(root: Path, folder: bool, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    if damage in FOLDERS and not folder:
        return
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    make = Maker(folder, seed)
    path = entry("kind", "name.x", make)
    assert path == root / "kind" / "name.x"
    assert entry("kind", "name.x", make) == path
    assert make.made == 1
    assert not caplog.records
    (DAMAGE | FOLDERS)[damage](path, record_path(root, "kind", "name.x"))
    assert not is_sound(path)
    assert entry("kind", "name.x", make) == path
    assert make.made == 2
    make.check(path)
    assert is_sound(path)
    if not damage.endswith("missing") or folder:
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert str(path) in caplog.text
    assert [file.name for file in path.parent.iterdir()] == ["name.x"]  # no part, no lock


def test_entries_are_not_taken_for_each_other(root: Path) -> None:
    first, second = Maker(True, 1), Maker(True, 2)
    paths = entry("kind", "a", first), entry("kind", "b", second)
    records = [record_path(root, "kind", name) for name in ("a", "b")]
    for one, other in (paths, records):
        one.rename(root / "aside")
        other.rename(one)
        (root / "aside").rename(other)
    entry("kind", "a", first)
    assert first.made == 2
    first.check(paths[0])


def test_what_was_verified_is_not_read_again_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.compiler.caching import record as module

    make = Maker(True, 3)
    path = entry("kind", "name", make)
    monkeypatch.setattr(module, "is_settled", lambda stamp: True)
    entry("kind", "name", make)
    with monkeypatch.context() as unread:
        unread.setattr(module, "hash_file", None)
        assert entry("kind", "name", make) == path
    flip(path / "graph")
    entry("kind", "name", make)
    assert make.made == 2


def test_again_makes_it_in_any_case() -> None:
    make = Maker(False, 4)
    entry("kind", "name", make)
    entry("kind", "name", make, again=True)
    assert make.made == 2


def test_a_maker_that_fails_leaves_nothing(root: Path) -> None:
    def fail(path: Path) -> None:
        Maker(True, 5)(path)
        raise ModelError("no such model")

    with pytest.raises(ModelError, match="no such model"):
        entry("kind", "name", fail)
    assert list((root / "kind").iterdir()) == []


def test_a_cache_that_is_full_or_cannot_be_written_says_so(root: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(BuildError, match=r"No space left.*TRIMTAB_CACHE"):
        entry("kind", "name", full)
    (root / "kind").rmdir()
    (root / "kind").write_text("a file where a folder belongs")
    with pytest.raises(BuildError, match=r"kind.*TRIMTAB_CACHE"):
        entry("kind", "name", Maker(False, 6))


@pytest.mark.parametrize("below", ["", "cache", "deep/cache"])
def test_a_cache_that_is_a_file_is_named(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file" / below))
    with pytest.raises(BuildError, match=r"file is a file, not a folder") as caught:
        entry("kind", "name", Maker(False, 6))
    assert "remove that file" in str(caught.value.hint) and "written" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


def test_errors_of_files_elsewhere_are_not_blamed_on_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        entry("kind", "name", lambda path: (tmp_path / "model.onnx").read_bytes())


def test_what_has_no_name_yet_gets_one(root: Path) -> None:
    make = Maker(True, 7)
    with part("kind") as made:
        make(made)
        path = entry("kind", "named", made.rename)
    make.check(path)
    assert [file.name for file in (root / "kind").iterdir()] == ["named"]
    with part("kind"):
        assert list((root / "kind").glob("unnamed-*")) != []  # its lock
    assert [file.name for file in (root / "kind").iterdir()] == ["named"]


def test_a_file_that_a_library_changes_in_place(caplog: pytest.LogCaptureFixture) -> None:
    """It is verified before each use; after damage, or a use that failed half-way, the library begins anew."""

    def use(add: bytes) -> bytes:
        with updated("timing", "gpu.cache") as path:
            before = path.read_bytes() if path.exists() else b""
            path.write_bytes(before + add)
            if not add:
                raise ModelError("failed")
        return before

    assert [use(b"one"), use(b"two"), use(b"three")] == [b"", b"one", b"onetwo"]
    assert not caplog.records
    with updated("timing", "gpu.cache") as path:
        pass
    assert is_sound(path)
    flip(path)
    assert [use(b"one"), use(b"two")] == [b"", b"one"]
    assert "started again" in caplog.text
    with pytest.raises(ModelError):
        use(b"")
    assert use(b"three") == b"onetwo"  # the failing use changed nothing
    with pytest.raises(ModelError), updated("timing", "gpu.cache"):
        path.write_bytes(b"half")
        raise ModelError("killed")
    assert use(b"one") == b""
    with updated("timing", "none"):  # a library may write nothing
        pass


def test_threads_make_an_entry_once() -> None:
    make, paths = Maker(True, 9), []
    slow = lambda path: (time.sleep(0.2), make(path))  # noqa: E731
    threads = [threading.Thread(target=lambda: paths.append(entry("kind", "name", slow))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.made == 1
    assert len(set(paths)) == 1
    make.check(paths[0])


CHILD = """
import sys, time
from pathlib import Path
from trimtab.compiler.cache import entry

def make(path):
    path.mkdir()
    (path / "first").write_bytes(bytes(1000))
    print("making", flush=True)
    sys.stdin.read() if sys.argv[1] == "told" else time.sleep(float(sys.argv[1]))
    (path / "second").write_bytes(bytes(1000))

print(entry("kind", sys.argv[2], make), flush=True)
"""


def child(until: float | str, name: str = "name") -> subprocess.Popen[str]:
    """Makes an entry that is not finished for some seconds, or until it is "told" by the end of its input."""
    command = [sys.executable, "-c", CHILD, str(until), name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_makes_and_the_other_waits(root: Path) -> None:
    children = [child(0.5), child(0.5)]
    said = [each.communicate()[0].splitlines() for each in children]
    assert sorted(said, key=len) == [[str(root / "kind" / "name")], ["making", str(root / "kind" / "name")]]


@pytest.mark.parametrize("name", ["name", "another"])
def test_what_a_killed_process_left_is_removed(root: Path, name: str) -> None:
    """By whoever makes the same entry, and by whoever makes another of its kind; a living process is left alone."""
    killed = child("told")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "making\n"
    living = child("told", "living")
    assert living.stdout is not None
    assert living.stdout.readline() == "making\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(list((root / "kind").glob("*.part"))) == 2
    make = Maker(True, 10)
    make.check(entry("kind", name, make))
    assert [path.name.split(".")[0] for path in (root / "kind").glob("*.part")] == ["living"]
    living.communicate()
    assert sorted(path.name for path in (root / "kind").iterdir()) == sorted(["living", name])
