"""Only files that the manifest lists are opened: no other file in the folders that runtimes search, no outside link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto

from trimtab.compiler.builds.manifest import NAME, Manifest
from trimtab.compiler.targets.base import ENGINE, MODEL, PLAN
from trimtab.passes.errors import BuildError

TOKENIZER = Path("tokenizer")

CLOSED = (MODEL.parent, ENGINE, TOKENIZER)
"""Folders in which runtimes and libraries search for files themselves."""


def check_listing(folder: Path, manifest: Manifest) -> None:
    """Check that `manifest` lists the model, every file of the folders in `CLOSED`, and no link out of the build.

    Raises:
        BuildError: names the file.
    """
    model = PLAN if manifest.shards > 1 else MODEL
    if model.as_posix() not in manifest.files:
        raise BuildError(f"{folder / NAME}: does not list {model.as_posix()}", hint="compile the model again")
    for path in _entries(folder):
        if path.relative_to(folder).as_posix() not in manifest.files:
            raise BuildError(
                f"{path}: does not belong to this build: the manifest does not list it",
                hint="remove it, or compile the model again",
            )
    root = folder.resolve()
    for name in manifest.files:
        if not (folder / name).resolve().is_relative_to(root):
            raise BuildError(
                f"{folder / name}: is a link that leads out of the build",
                hint="copy the build with the targets of its links, such as with `cp -rL`",
            )


def check_references(folder: Path, manifest: Manifest) -> None:
    """Check that `manifest` lists the data files from which its ONNX files read weights.

    Raises:
        BuildError: names the file.
    """
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.parent != PurePosixPath(MODEL.parent) or path.suffix != MODEL.suffix:
            continue
        for location in data_files(folder / name):
            needed = os.path.normpath(path.parent / location)
            if needed not in manifest.files:
                raise BuildError(
                    f"{folder / NAME}: does not list {needed}, from which {name} reads weights",
                    hint="compile the model again",
                )


def data_files(path: Path) -> set[str]:
    """The names of the external data files of an ONNX file.

    Raises:
        BuildError: the file is not an ONNX file.
    """
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise BuildError(f"{path}: is not an ONNX file", hint="compile the model again") from error
    external = (t for t in onnx.external_data_helper._get_all_tensors(model) if t.data_location == TensorProto.EXTERNAL)
    return {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}


def _entries(folder: Path) -> Iterator[Path]:
    """Files in the folders of `CLOSED`, and links to folders, which are not followed."""
    for part in CLOSED:
        for place, folders, files in os.walk(folder / part):
            yield from (Path(place) / name for name in files)
            yield from (path for name in folders if (path := Path(place) / name).is_symlink())
