"""What the operating system refuses, in plain words: the file, the reason, and a remedy that fits."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trimtab.compiler.data import read_data
from trimtab.compiler.data.textfile import read_texts
from trimtab.compiler.schema.yaml_text import read_yaml
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import ModelError, ProfileError, TrimtabError
from trimtab.passes.graph import load_graph
from trimtab.passes.os_errors import blames, check_readable, reason, remedy
from trimtab.passes.profile import Profile, ProfileInfo


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "free some space in "), (errno.EDQUOT, "free some space in "), (errno.EACCES, "permissions"),
        (errno.EROFS, "read-only"), (errno.EFBIG, "ulimit -f"), (errno.EMFILE, "ulimit -n"),
        (errno.ENOTDIR, "a file is where a folder should be"), (errno.EIO, "disk reports a fault"),
    ],
)  # fmt: skip
def test_each_reason_has_its_own_remedy(number: int, says: str, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "file"))
    assert reason(error) == os.strerror(number)
    assert says in remedy(error)
    assert ("space" in remedy(error)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert "see that" in remedy(OSError("odd"))


def test_a_full_disk_is_named_where_temporary_files_are_on_another() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    temporary = tempfile.gettempdir()
    assert remedy(full, f"{temporary}/no/such/folder") == f"free some space in {temporary}, or use another disk"
    assert "in /proc, or in " in remedy(full, "/proc/no/folder") and "TMPDIR" in remedy(full, "/proc/no/folder")
    assert "TMPDIR" in remedy(full)


def test_which_folder_an_error_is_of(tmp_path: Path) -> None:
    def of(name: Path) -> OSError:
        return OSError(errno.EACCES, "Permission denied", str(name))

    assert blames(OSError(errno.ENOSPC, "No space left on device"), tmp_path)
    assert all(blames(of(path), tmp_path) for path in (tmp_path, tmp_path / "a" / "b", tmp_path.parent, Path("/")))
    assert not blames(of(tmp_path.with_name(f"{tmp_path.name}2")), tmp_path)
    assert not blames(of(Path("/elsewhere/model.onnx")), tmp_path)


def read_lines(path: Path) -> list[object]:
    return list(read_texts(path.rename(path.with_name("file.txt"))))


def read_npz(path: Path) -> object:
    return read_data(path.rename(path.with_name("file.npz")))


@pytest.mark.parametrize("read", [load_graph, Profile.load, read_yaml, read_lines, read_npz])
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    read: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")

    def denied(name: object, *_: object, **__: object) -> None:  # file modes do not bind root
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr("builtins.open", denied)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(TrimtabError, match=r"file(\.\w+)?: cannot be read \(Permission denied\)") as caught:
        read(path)  # type: ignore[operator]
    monkeypatch.undo()
    assert "permissions" in str(caught.value.hint)
    check_readable(tmp_path / next(tmp_path.iterdir()), ModelError)


@pytest.mark.parametrize("read", [load_graph, Profile.load, read_yaml, read_data, open_source])
def test_a_path_that_is_no_file_says_what_it_is(read: object, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    paths = {"none": "no such ", "link": "is a link to .*gone, where there is no ", "pipe": "is a device or a pipe"}
    paths |= {"folder": "no model in this directory" if read is open_source else "is a directory, not a "}
    for name, says in paths.items():
        with pytest.raises(TrimtabError, match=f"{name}: {says}") as caught:
            read(tmp_path / name)  # type: ignore[operator]
        assert caught.value.hint


def test_a_profile_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trimtab.passes.profile.save_file", full)
    profile = Profile(ProfileInfo(model="m", data="d", samples=1, tokens=1, versions={}))
    with pytest.raises(ProfileError, match=r"cannot write the profile \(No space left on device\)") as caught:
        profile.save(tmp_path / "profile")
    assert f"free some space in {tmp_path}" in str(caught.value.hint)
