"""Runs native code that may not come back: signals are answered meanwhile, and there is a limit of time."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread
from typing import TypeVar

_Result = TypeVar("_Result")
_LEAVE_S = 10.0
"""Seconds to wait for a call that was told to stop."""


def within(seconds: float, call: Callable[[], _Result], stop: Callable[[], object]) -> _Result:
    """The result of `call`, which runs in a thread of its own. This one answers signals: Python handles none in native
    code.

    Args:
        stop: lets `call` end soon, from this thread; called when the time is over, and on Ctrl-C or SIGTERM.

    Raises:
        TimeoutError: `call` took longer than `seconds`.
        Exception: what `call` raises.
    """
    done = Event()  # an interrupted Thread.join of Python 3.11 takes the thread for ended
    results: list[_Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    Thread(target=work, daemon=True).start()
    try:
        if not done.wait(seconds):
            raise TimeoutError
    finally:
        if not done.is_set():
            stop()
            done.wait(_LEAVE_S)
    if errors:
        raise errors[0]
    return results[0]
