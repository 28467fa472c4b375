"""Hashes of files that have not changed are kept; a file that changed in any way is read again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from blake3 import blake3
from seeds import seeded

from trimtab.compiler.caching import remembered as module
from trimtab.compiler.caching import stamp
from trimtab.compiler.caching.remembered import file_hash, remembered
from trimtab.compiler.sources import checkpoint
from trimtab.compiler.sources.source import weights_hash
from trimtab.passes.hashing import hash_bytes, hash_file


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_memory", {})
    monkeypatch.setattr(module, "_WORTH", 0)
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Wait for the next tick of the file system's clock; files that are older count as settled, not only old ones."""
    monkeypatch.setattr(stamp, "_YOUNG_NS", 20_000_000)
    return lambda: time.sleep(0.04)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to be hashed."""
    files: list[Path] = []
    monkeypatch.setattr(module, "hash_file", lambda path: files.append(path) or hash_file(path))
    return files


def rewrite(path: Path, place: int, *, rename: bool = False) -> None:
    """Change one byte; size and mtime stay, and the inode, too, unless the file is replaced by a new one."""
    data, before = bytearray(path.read_bytes()), path.stat()
    data[place] ^= 1
    target = path.with_name("new") if rename else path
    target.write_bytes(data)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    target.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_hashes_are_blake3_of_the_whole_or_a_part(tmp_path: Path) -> None:
    data = seeded().bytes(9_000_001)
    (tmp_path / "f").write_bytes(data)
    assert hash_file(tmp_path / "f") == file_hash(tmp_path / "f") == blake3(data).hexdigest()
    assert hash_file(tmp_path / "f", 17, 5_000_000) == blake3(data[17:5_000_017]).hexdigest()
    assert hash_file(tmp_path / "f", 17, 0) == blake3(b"").hexdigest()
    with pytest.raises(OSError, match="early"):
        hash_file(tmp_path / "f", 17, len(data))
    assert hash_bytes("ab", "c") != hash_bytes("a", "bc")


def test_an_unchanged_file_is_read_once_here_and_by_other_processes(
    tmp_path: Path, settled: Callable[[], None], reads: list[Path]
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(5000))
    settled()
    first = file_hash(path)
    assert file_hash(path) == first
    module._memory.clear()  # another process
    assert file_hash(path) == first
    assert reads == [path]


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("place", [0, 2500, -1])
def test_one_byte_is_noticed_whatever_the_times_say(
    tmp_path: Path, settled: Callable[[], None], place: int, rename: bool
) -> None:
    path = tmp_path / "f"
    path.write_bytes(seeded().bytes(5000))
    for _ in range(3):
        settled()
        assert file_hash(path) == hash_file(path)
        rewrite(path, place, rename=rename)
        assert file_hash(path) == hash_file(path)


def test_a_young_file_is_read_each_time(
    tmp_path: Path, settled: Callable[[], None], reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    os.utime(path, ns=(0, 0))  # mtime can be made up, ctime tells
    with monkeypatch.context() as patched:
        patched.setattr(stamp, "_YOUNG_NS", 10**15)  # however slow this machine is
        for round_ in range(1, 4):
            file_hash(path)
            assert len(reads) == round_
    path.write_bytes(bytes(100))
    os.utime(path, ns=(2**62, 2**62))  # and what comes from the future proves nothing
    settled()
    file_hash(path)
    file_hash(path)
    assert len(reads) == 5


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, settled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    settled()

    def changing(path: Path) -> str:
        value = hash_file(path)
        rewrite(path, 3)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(module, "hash_file", changing)
        file_hash(path)
    settled()
    assert file_hash(path) == hash_file(path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"flip"])
def test_a_kept_hash_that_was_damaged_is_not_believed(
    root: Path, tmp_path: Path, settled: Callable[[], None], reads: list[Path], content: bytes | None
) -> None:
    path = tmp_path / "f"
    path.write_bytes(seeded().bytes(100))
    settled()
    first = file_hash(path)
    (kept,) = (root / "stamps").iterdir()
    if content == b"flip":
        kept.write_bytes(kept.read_bytes().replace(first.encode(), first[::-1].encode()))
    elif content is None:
        kept.unlink()
    else:
        kept.write_bytes(content)
    module._memory.clear()
    assert file_hash(path) == first
    assert len(reads) == 2


def test_small_files_and_young_ones_leave_nothing_in_the_cache(
    root: Path, tmp_path: Path, settled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    with monkeypatch.context() as patched:
        patched.setattr(stamp, "_YOUNG_NS", 10**15)  # however slow this machine is
        file_hash(path)
    settled()
    monkeypatch.setattr(module, "_WORTH", 101)
    file_hash(path)
    assert not (root / "stamps").exists()
    assert len(module._memory) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(
    root: Path, tmp_path: Path, settled: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    settled()
    for cache in (tmp_path / "file" / "below", root):
        (tmp_path / "file").write_text("")
        root.mkdir(exist_ok=True)
        (root / "stamps").touch()
        monkeypatch.setenv("TRIMTAB_CACHE", str(cache))
        monkeypatch.setattr(module, "_memory", {})
        assert file_hash(path) == hash_file(path)


def test_a_value_of_several_files_follows_each(tmp_path: Path, settled: Callable[[], None]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("other")
    other.write_bytes(bytes(10))
    computed = []

    def value() -> str:
        def read() -> tuple[list[Path], Callable[[], str]]:
            return [tmp_path / one.read_text()], lambda: computed.append(1) or other.read_bytes().hex()

        return remembered("both", one, read)

    settled()
    assert value() == value() == bytes(10).hex()
    assert len(computed) == 1
    rewrite(other, 4)
    assert value() == other.read_bytes().hex()
    settled()
    value()
    other.unlink()
    with pytest.raises(FileNotFoundError):
        value()


def test_a_models_fingerprint_follows_its_external_data(tmp_path: Path, settled: Callable[[], None]) -> None:
    tiny.model(tmp_path / "m.onnx", seed=int(np.random.default_rng().integers(1 << 30)), external=True)
    (data,) = set(tmp_path.iterdir()) - {tmp_path / "m.onnx"}
    seen = set()
    for place in (None, 0, data.stat().st_size // 2, data.stat().st_size - 1):
        if place is not None:
            rewrite(data, place)
        settled()
        prints = {weights_hash(tmp_path / "m.onnx") for _ in range(2)}
        module._memory.clear()
        seen |= prints | {weights_hash(tmp_path / "m.onnx")}
        assert len(prints) == 1
    assert len(seen) == 4


def test_a_models_fingerprint_follows_a_link_to_its_data(tmp_path: Path, settled: Callable[[], None]) -> None:
    """The data file is a link inside the model's folder, which then leads to another file."""
    model = tmp_path / "m.onnx"
    tiny.model(model, seed=0, external=True)
    (data,) = set(tmp_path.iterdir()) - {model}
    changed = bytearray(data.read_bytes())
    changed[len(changed) // 2] ^= 1
    data.rename(tmp_path / "first.bin")
    (tmp_path / "second.bin").write_bytes(changed)
    data.symlink_to("first.bin")
    settled()
    first = weights_hash(model)
    data.unlink()
    data.symlink_to("second.bin")
    assert weights_hash(model) != first
    data.unlink()
    data.symlink_to("first.bin")
    assert weights_hash(model) == first


def test_a_checkpoint_follows_every_byte_of_its_shards(tmp_path: Path, settled: Callable[[], None]) -> None:
    from safetensors.numpy import save_file

    rng, names = seeded(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file({name[:11]: rng.random((70, 30)).astype(np.float16)}, tmp_path / name)
    index = {"weight_map": {name[:11]: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    digests = []
    for name in (None, *names):
        for place in (-1, -2000, -4200) if name else (0,):
            if name:
                rewrite(tmp_path / name, place)
            settled()
            digests.append(checkpoint.read_checkpoint(tmp_path).digest)
            assert checkpoint.read_checkpoint(tmp_path).digest == digests[-1]
    assert len(set(digests)) == 7
