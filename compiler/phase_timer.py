"""Times the phases of a compile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from trimtab.compiler.memory import give_back, resident_bytes
from trimtab.compiler.progress import Progress


class PhaseTimer:
    """Times phases and reports them as progress.

    Attributes:
        seconds: phase → duration.
        progress: the callback, for phases that report their own progress.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress: Progress = progress or (lambda what, done, total: None)
        self.seconds: dict[str, float] = {}
        self._resident = resident_bytes()

    @contextmanager
    def __call__(self, name: str, *, shown: bool = True) -> Iterator[None]:
        """Time the body, and return the memory it freed. Pass `shown=False` if the body reports its own progress."""
        start = time.perf_counter()
        if shown:
            self.progress(name, 0, 1)
        yield
        self.give_back()
        self.seconds[name] = round(time.perf_counter() - start, 3)
        if shown:
            self.progress(name, 1, 1)

    def give_back(self) -> None:
        """Return the memory freed since the last call."""
        self._resident = give_back(self._resident)
