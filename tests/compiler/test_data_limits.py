"""Data files that are damaged, or that ask for more than they hold, end in a DataError before anything is unpacked."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from seeds import seeded

from trimtab.compiler.data import arrays, read_data, textfile
from trimtab.passes.errors import DataError


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    return buffer.getvalue()


def archive(path: Path, *members: tuple[str, bytes], pack: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", pack) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


@pytest.mark.parametrize("pack", [np.savez, np.savez_compressed])
def test_arrays_are_as_numpy_has_them(pack: Callable[..., None], tmp_path: Path) -> None:
    rng = seeded()
    kinds = ("?", "i1", "<i2", ">i4", "i8", "u1", "u8", "f2", "f4", ">f8")
    wanted = {f"a{i}": rng.integers(0, 2, (5, *rng.integers(0, 4, i % 4))).astype(k) for i, k in enumerate(kinds)}
    wanted["fortran"] = np.asfortranarray(rng.random((5, 3, 2)))
    pack(tmp_path / "d.npz", **wanted)
    found = arrays.read_npz(tmp_path / "d.npz")
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].flags.writeable


def header(shape: str, descr: str = "<i8") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("(3, 4)") + bytes(95), r"its shape \[3, 4\] of int64 takes 96 bytes, and it has 95"),
        (header("(3, 4)") + bytes(97), "takes 96 bytes, and it has 97"),
        (header(f"({10**12}, {10**12})"), "takes 8000000000000000000000000 bytes, and it has 0"),
        (header("(" + "9" * 4000 + ",)"), "bytes, and it has 0"),
        (header("(-1, 2)"), "is not an array of plain numbers"),
        (header("(1e3,)"), "is not an array of plain numbers"),
        (header("(2,)", "|V8") + bytes(16), "is not an array of plain numbers"),
        (header("(" + "1, " * 90 + ")") + bytes(8), "not an .npz file of plain arrays"),
        (npy(np.zeros((2, 2)))[:9], "is not an array of plain numbers"),
        (b"\x93NUMPY\x04\x00" + bytes(20), "is no array"),
        (b"", "is no array"),
    ],
)
def test_headers_are_compared_with_what_is_there(content: bytes, message: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "d.npz", ("ids.npy", content))
    with pytest.raises(DataError, match=message) as caught:
        read_data(path)
    assert str(path) in caught.value.message and caught.value.hint


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    whole = npy(np.ones((4, 3), np.int64))
    with pytest.warns(UserWarning, match="Duplicate"):
        path = archive(tmp_path / "d.npz", ("a.npy", whole), ("a.npy", whole))
    with pytest.raises(DataError, match=r"'a\.npy' comes twice"):
        read_data(path)
    for pack in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(DataError, match="packed by another method"):
            read_data(archive(tmp_path / "d.npz", ("a.npy", whole), pack=pack))
    with pytest.raises(DataError, match="has 1025 members, over the limit of 1024"):
        read_data(archive(tmp_path / "d.npz", *((f"a{i}.npy", b"") for i in range(1025))))


def test_what_is_unpacked_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte here; files that are not packed have no limit."""
    limit = 1 << 20
    monkeypatch.setattr(arrays, "MAX_UNPACKED", limit)
    monkeypatch.setattr(textfile, "MAX_UNPACKED", limit)
    many = np.ones((limit // 8, 1), np.int64)
    np.savez(tmp_path / "plain.npz", x=many)
    assert read_data(tmp_path / "plain.npz").count == len(many)
    np.savez_compressed(tmp_path / "packed.npz", x=many)
    with pytest.raises(DataError, match=rf"unpacks to {limit + 128} bytes, over the limit of {limit}"):
        read_data(tmp_path / "packed.npz")
    lines = b"word\n" * (limit // 5 + 1)
    (tmp_path / "plain.txt").write_bytes(lines)
    assert read_data(tmp_path / "plain.txt").count == limit // 5 + 1
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(lines))
    with pytest.raises(DataError, match=f"line {limit // 5 + 1}: unpacks to more than the limit of {limit} bytes"):
        read_data(tmp_path / "packed.txt.gz")


def sound(rng: np.random.Generator) -> dict[str, bytes]:
    """Name of a data file → content, small enough that a few changed bytes meet every part of it."""
    rows = [{"text": f"w{i} ü", "label": int(i % 2)} for i in rng.integers(0, 9, 6)]
    jsonl = "".join(json.dumps(row, ensure_ascii=bool(i % 2)) + "\n" for i, row in enumerate(rows)).encode()
    tsv = b"text\tlabel\n" + b"".join(f"{row['text']}\t{row['label']}\n".encode() for row in rows)
    files = {"d.jsonl": jsonl, "d.tsv": tsv, "d.txt": tsv, "d.jsonl.gz": gzip.compress(jsonl)}
    for name, save in (("d.npz", np.savez), ("e.npz", np.savez_compressed)):
        buffer = io.BytesIO()
        save(buffer, input_ids=rng.integers(0, 9, (4, 5)), label=rng.integers(0, 2, 4))
        files[name] = buffer.getvalue()
    return files


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut, or with some bytes changed, taken out, or put in."""
    array = bytearray(content)
    if rng.random() < 0.2:
        return bytes(array[: rng.integers(0, len(array))])
    for _ in range(rng.integers(1, 4)):
        at, length = int(rng.integers(0, len(array))), int(rng.integers(1, 5))
        other = rng.choice([bytes(rng.integers(0, 256, length).astype(np.uint8)), b"\xff" * length, b"", b"9" * 40])
        array[at : at + (length if rng.random() < 0.8 else 0)] = bytes(other)
    return bytes(array)


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    rng, refused = seeded(), 0
    for _ in range(60):
        for name, content in sound(rng).items():
            (tmp_path / name).write_bytes(damaged(content, rng))
            try:
                data = read_data(tmp_path / name)
                assert data.arrays is not None or len(list(data.texts)) == data.count
            except DataError as error:
                refused += 1
                assert str(tmp_path / name) in error.message
    assert refused > 60
