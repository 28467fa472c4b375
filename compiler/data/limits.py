"""Limits of data files, so that a small file from an unknown author cannot exhaust memory."""

from __future__ import annotations

MAX_LINE = 16 << 20
"""Maximum bytes of a line. No model reads a longer text at once."""

MAX_UNPACKED = 1 << 30
"""Maximum bytes that a packed file may unpack to. Files that are not packed may have any size."""

MAX_NAME = 1000
"""Maximum characters of a class name."""
