"""Suppresses a library's log messages during a call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hushed(*loggers: str) -> Iterator[None]:
    """Drop the calling thread's log records below ERROR on `loggers` ("" is the root logger).

    Filters drop the records, since two threads that change and restore a level in turns may leave it changed. Records
    of child loggers are not dropped.
    """
    thread = threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != thread

    named_loggers = [logging.getLogger(name) for name in loggers]
    for logger in named_loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        for logger in named_loggers:
            logger.removeFilter(passes)
