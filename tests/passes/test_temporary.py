"""Temporary folders: they go with their process, however it ends, and nobody else's are touched."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trimtab.passes import temporary
from trimtab.passes.temporary import temporary_folder

HOLDER = """
import os, sys
from trimtab.passes.temporary import temporary_folder
with temporary_folder(sys.argv[1]) as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").write_text("content")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    temporary._remove_left.cache_clear()
    yield tmp_path
    temporary._remove_left.cache_clear()


def holder(purpose: str) -> tuple[subprocess.Popen[str], Path]:
    """Another process that has a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, purpose], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_there_for_the_body_alone(parent: Path) -> None:
    with pytest.raises(ValueError, match="odd"), temporary_folder("serve") as folder:
        assert folder.parent == parent and folder.is_dir() and "serve" in folder.name
        (folder / "file").write_text("content")
        raise ValueError("odd")
    assert list(parent.iterdir()) == []


@pytest.mark.parametrize("purpose", ["serve", "build"])
def test_what_a_killed_process_left_goes_with_the_next_one(purpose: str, parent: Path) -> None:
    killed, left = holder("serve")
    alive, kept = holder("serve")
    killed.kill()
    killed.communicate()
    assert (left / "deep" / "file").is_file()
    with temporary_folder(purpose) as folder:
        assert sorted(parent.iterdir()) == sorted([kept, folder])
        assert (kept / "deep" / "file").read_text() == "content"
    alive.communicate("")
    assert list(parent.iterdir()) == []


def test_a_folder_beside_an_output(parent: Path) -> None:
    place = parent / "outputs"
    place.mkdir()
    left, other = place / "trimtab-package-x.tmp", parent / "trimtab-package-y.tmp"
    for folder in (left, other):
        (folder / "deep").mkdir(parents=True)
    with temporary_folder("package", place) as folder:
        assert list(place.iterdir()) == [folder] and other.is_dir()
    assert list(place.iterdir()) == []


def test_what_is_of_others_stays(parent: Path) -> None:
    (parent / "elsewhere").mkdir()
    (parent / "elsewhere" / "file").write_text("mine")
    (parent / "trimtab-link.tmp").symlink_to("elsewhere")
    (parent / "trimtab-file.tmp").write_text("mine")
    (parent / "trimtab-other").mkdir()
    before = sorted(parent.iterdir())
    with temporary_folder("serve"):
        pass
    assert sorted(parent.iterdir()) == before and (parent / "elsewhere" / "file").read_text() == "mine"


def test_a_folder_that_another_process_took_for_left_is_made_again(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, tried = tempfile.mkdtemp, []

    def taken(**options: str) -> str:
        folder = make(**options)
        tried.append(folder)
        if len(tried) < 3:
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with temporary_folder("serve") as folder:
        assert folder.is_dir() and str(folder) == tried[2]


def test_threads_have_folders_of_their_own(parent: Path) -> None:
    def use(number: int) -> str:
        with temporary_folder("part") as folder:
            temporary._remove_left.cache_clear()
            temporary._remove_left(parent)
            (folder / "file").write_text(str(number))
            return (folder / "file").read_text()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(use, range(40))) == [str(number) for number in range(40)]
    assert list(parent.iterdir()) == []
