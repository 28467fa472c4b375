"""How much of a data file is read: bounds on what a small file of someone else can ask for."""

from __future__ import annotations

MAX_LINE = 16 << 20
"""Bytes of a line: more is no text that a model reads at once."""

MAX_UNPACKED = 1 << 30
"""Bytes that a packed file may unpack to. Files that are not packed may have any size."""

MAX_NAME = 1000
"""Characters of a class name."""
