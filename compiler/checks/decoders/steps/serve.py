"""The side of a timed child: says what it is, then does what each line that it is sent asks for.

Needs the standard library and numpy alone, since peers have interpreters of their own. A child that waits for its next
line blocks on it, and takes no time from the one whose turn it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any


def options() -> dict[str, Any]:
    """What the process was started with, by name."""
    given: dict[str, Any] = json.loads(sys.argv[1])
    return given


def serve(about: dict[str, object], **calls: Callable[[], object]) -> None:
    """Print `about` as one line of JSON, then answer every line of input after the call of that name."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print(flush=True)
