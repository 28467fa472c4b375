"""The side of a timed child: says what it is, then takes one step for every line that it is sent.

Standard library alone, since peers have interpreters of their own. A child that waits for its next line blocks on it,
and takes no time from the one whose turn it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable


def serve(step: Callable[[], object], about: dict[str, object]) -> None:
    """Print `about` as one line of JSON, then answer every line of input after one `step`."""
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
        step()
        print(flush=True)
