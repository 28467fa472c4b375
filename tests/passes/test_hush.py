"""What a library logs is kept from the user for one call of one thread, and logging is then as it was."""

from __future__ import annotations

import logging
import threading

import pytest

from trimtab.passes.hush import hushed


def test_threads_that_overlap_leave_logging_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """The first to come is the first to go, so that each ends while the other is inside."""
    root, first_in, second_in = logging.getLogger(), threading.Event(), threading.Event()
    before = root.level, list(root.filters)

    def first() -> None:
        with hushed(""):
            first_in.set()
            assert second_in.wait(60)
            root.warning("of the first")

    def second() -> None:
        assert first_in.wait(60)
        with hushed(""):
            second_in.set()
            one.join(60)
            root.warning("of the second")
            root.error("an error")

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    two.start()
    assert second_in.wait(60)
    root.warning("of another thread")
    two.join(60)
    root.warning("afterwards")
    assert sorted(caplog.messages) == ["afterwards", "an error", "of another thread"]
    assert (root.level, list(root.filters)) == before
