"""Memory that phases give back, and when it is not worth looking for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from trimtab.compiler.memory import peak_memory_bytes
from trimtab.compiler.phase_timer import PhaseTimer

pytestmark = pytest.mark.skipif(peak_memory_bytes() is None, reason="the system does not tell what a process holds")
MIB = 1 << 20


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, megabytes: int) -> None:
        self.held, self.self = np.ones(megabytes * MIB, np.uint8), self


@pytest.fixture
def full_collections() -> Iterator[list[int]]:
    """Grows with each collection that looks at every object; there are none but those asked for."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and info["generation"] == 2:
            seen.append(1)

    gc.disable()
    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)
    gc.enable()


def test_what_a_phase_left_is_given_back(full_collections: list[int]) -> None:
    phases = PhaseTimer()
    with phases("large"):
        alive = weakref.ref(Cycle(128))
    assert alive() is None and full_collections == [1]
    assert set(phases.seconds) == {"large"}


def test_a_small_phase_does_not_look_through_the_process(full_collections: list[int]) -> None:
    phases = PhaseTimer()
    for number in range(3):
        with phases(str(number)):
            Cycle(1)
    assert full_collections == []
    for number in range(60):  # but they add up
        with phases(str(number)):
            Cycle(1)
    assert 2 <= len(full_collections) <= 15


def test_what_is_held_is_not_looked_for_again(full_collections: list[int]) -> None:
    phases, held = PhaseTimer(), []
    with phases("first"):
        held.append(Cycle(128))
    with phases("second"):
        pass
    assert full_collections == [1]
    held.clear()
