"""blake3 of files and of parts of them: the hash of fingerprints, of build keys and of the cache."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

_CHUNK = 1 << 22  # bytes read at a time; the buffer stays in the processor's cache, and memory does not grow


def hash_file(path: Path, start: int = 0, size: int | None = None) -> str:
    """blake3 of `size` bytes of a file from `start` on, or of all that follow.

    Raises:
        OSError: the file cannot be read.
        EOFError: it ends before `size` bytes.
    """
    digest, buffer = blake3(), memoryview(bytearray(_CHUNK))
    left = size
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left is None or left > 0:
            count = file.readinto(buffer if left is None else buffer[: min(left, _CHUNK)])
            if not count:
                break
            digest.update(buffer[:count])
            left = None if left is None else left - count
    if left:
        raise EOFError(f"{path}: ends {left} bytes early")
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
