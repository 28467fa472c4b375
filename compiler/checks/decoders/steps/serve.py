"""The child's side of the protocol: report facts about the engine, then run the call that each input line names.

This module needs the standard library alone, since peers have interpreters of their own. A child that waits for its
next line blocks, and takes no CPU time from the engine whose turn it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

DONE = "done"
"""The answer to each input line; libraries may print other lines."""


def start(main: Callable[..., object]) -> None:
    """Call `main` with the options of the command line, by name. An exception is reported in a line on stderr."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    try:
        main(**options)
    except Exception as error:
        sys.exit(str(error) or type(error).__name__)


def serve(about: dict[str, object], **calls: Callable[[], object]) -> None:
    """Print `about` as one line of JSON, then run the call that each line of input names, and answer it."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print(DONE, flush=True)
