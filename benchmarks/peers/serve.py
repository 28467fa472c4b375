"""The side of a timed child: says what it is, then does what each line that it is sent asks for.

Standard library alone, since peers have interpreters of their own. A child that waits for its next line blocks on it,
and takes no time from the one whose turn it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def serve(about: dict[str, object], **calls: Callable[[], object]) -> None:
    """Print `about` as one line of JSON, then answer every line of input after the call of that name."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print(flush=True)
