"""The side of a timed child: says what it is, then does what each line that it is sent asks for.

Needs the standard library and numpy alone, since peers have interpreters of their own. A child that waits for its next
line blocks on it, and takes no time from the one whose turn it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

DONE = "done"
"""The line that answers each one that was sent; libraries may print others."""


def start(main: Callable[..., object]) -> None:
    """Call `main` with what the process was started with, by name. What goes wrong is said in a line."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    try:
        main(**options)
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)


def serve(about: dict[str, object], **calls: Callable[[], object]) -> None:
    """Print `about` as one line of JSON, then answer every line of input after the call of that name."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print(DONE, flush=True)
