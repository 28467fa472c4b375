"""Swap the names of two directories atomically: Linux' renameat2 with RENAME_EXCHANGE, which Python does not offer."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
"""Errors of kernels, file systems and sandboxes that do not support an exchange."""


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two directories, so that both names exist at all times.

    Returns:
        False if the system or the file system does not support it; nothing has changed then.

    Raises:
        OSError: as `os.rename`.
    """
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


@lru_cache
def _renameat2() -> Any:
    """The C library's function `renameat2`, or None if the library has none."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    function.restype = ctypes.c_int
    return function
