"""Notes that a library logs on itself, kept from the user while it is called."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed(*loggers: str) -> Iterator[None]:
    """Keep what is below an error from the handlers of `loggers` ("" is the root), of the calling thread alone.

    By filters, not by levels: a level that two threads change and put back in turns may stay changed. What is logged on
    a child of a logger is not hushed.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != thread

    found = [logging.getLogger(name) for name in loggers]
    for logger in found:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in found:
            logger.removeFilter(passes)
