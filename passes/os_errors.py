"""Errors of the operating system in plain words: what is wrong with a file or folder, and what to do."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from trimtab.passes.errors import TrimtabError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = "change its permissions, or use another file or folder"
_IN_THE_WAY = "a file is where a folder should be: use another folder, or remove that file"
_REMEDIES = {
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "the file system is read-only: use a folder on another one",
    errno.EFBIG: "files may not grow so large there: raise the limit (ulimit -f), or use another file system",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EISDIR: "name a file, not a folder",
    errno.ENOENT: "see that the path is right, and that nothing removes it meanwhile",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: end other programs",
    errno.EIO: "the disk reports a fault: look at the system's log, and use another disk",
    errno.ENODATA: "the file is cut off: copy it again, or make it again",
    errno.ESTALE: "the network file system has lost the file: mount it again",
    errno.ELOOP: "links lead to each other: name the file itself",
    errno.ENOMEM: "memory ran out: end other programs, or use a machine with more memory",
}


def reason(error: OSError) -> str:
    """The system's message without the file's name and the error's number."""
    return error.strerror or str(error)


def remedy(error: OSError, folder: Path | str | None = None) -> str:
    """The hint of an error: what to do.

    Args:
        folder: the folder that was written to; by default the folder of the error's file.
    """
    if error.errno in _FULL:
        return f"free some space {_disks(folder or error.filename)}, or use another disk"
    return _REMEDIES.get(error.errno or 0, "see that the file or folder can be read and written")


def blames(error: OSError, folder: Path | str) -> bool:
    """Whether `error` names a file in `folder`, the folder itself, a parent folder, or no file.

    Errors of open files name no file.
    """
    if error.filename is None:
        return True
    name, place = (os.path.abspath(os.fsdecode(path)) for path in (error.filename, folder))
    return name == place or name.startswith(place + os.sep) or place.startswith(name.rstrip(os.sep) + os.sep)


def _disks(place: Path | str | bytes | None) -> str:
    """Where space may be missing: on the disk of `place`, and on the disk of temporary files if they differ."""
    temporary = tempfile.gettempdir()
    if place is None:
        return f"on the disk that is written to, or in {temporary} (TMPDIR)"
    folder = Path(os.fsdecode(place)).absolute()
    folder = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
    try:
        same = os.stat(folder).st_dev == os.stat(temporary).st_dev
    except OSError:
        same = True
    return f"in {folder}" if same else f"in {folder}, or in {temporary} (TMPDIR)"


def no_file(path: Path | str, kind: type[TrimtabError], what: str = "file", *, hint: str | None = None) -> TrimtabError:
    """The error of a path where a file should be, and is none.

    Args:
        what: what the file should hold, such as "recipe".
    """
    if os.path.isdir(path):
        return kind(f"{path}: is a directory, not a {what}", hint=hint)
    if os.path.exists(path):
        return kind(f"{path}: is a device or a pipe, not a {what}", hint="write its content to a file, and give that")
    if os.path.islink(path):
        return kind(f"{path}: is a link to {os.readlink(path)}, where there is no {what}", hint=hint)
    return kind(f"{path}: no such {what}", hint=hint)


def unreadable(path: Path | str, error: OSError, kind: type[TrimtabError]) -> TrimtabError:
    """The error of a file that the system refuses to read."""
    return kind(f"{path}: cannot be read ({reason(error)})", hint=remedy(error))


def check_readable(path: Path | str, kind: type[TrimtabError]) -> None:
    """Refuse a file that cannot be opened. Libraries would report it as damaged or missing.

    Raises:
        kind: the file cannot be opened.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise unreadable(path, error, kind) from error
