"""blake3 of files and parts of files. Fingerprints, build keys and cache keys use this hash."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blake3 import blake3

_CHUNK = 1 << 20  # bytes read at a time: the buffer stays in the cache of a core, and memory does not grow


def hash_file(path: Path, start: int = 0, size: int | None = None) -> str:
    """blake3 of `size` bytes of a file from `start` on, or of all bytes after `start`.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    digest = blake3()
    with open(path, "rb", buffering=0) as file:
        left = max(os.fstat(file.fileno()).st_size - start, 0) if size is None else size
        buffer = memoryview(bytearray(min(left, _CHUNK)))
        file.seek(start)
        while left:
            count = file.readinto(buffer[: min(left, _CHUNK)])
            if not count:
                raise OSError(errno.ENODATA, f"ends {left} bytes early", str(path))
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def hash_data(data: bytes | memoryview) -> str:
    """blake3 of `data`: the hash of a file that holds these bytes."""
    return blake3(data).hexdigest()


def hash_bytes(*parts: bytes | str | memoryview) -> str:
    """blake3 of `parts`, each with its length: no two lists of parts share their bytes."""
    digest = blake3()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(memoryview(data).nbytes.to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
