"""What commands say to their user: errors, progress and JSON. Only results go to stdout."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn, TextIO

import typer

log = logging.getLogger("trimtab")

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) as work advances."""

_PLAIN_INTERVAL = 5.0  # seconds between progress lines where stderr is no terminal
_json_stream: TextIO | None = None  # stdout as it was, while a command that was asked for JSON runs


def set_up_logging(level: int) -> None:
    """Log trimtab's own messages from `level` up, and other packages' from WARNING up, as plain lines on stderr."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    log.setLevel(level)


@contextmanager
def reporting_errors() -> Iterator[None]:
    """End the process with one message, and no traceback, when the body fails. Also serves as a decorator.

    Exit codes: 1 for any error, 130 when interrupted (Ctrl-C), 143 when ended by SIGTERM; usage errors are left to
    typer, which exits with 2.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Terminated:
        fail("terminated", label="", code=128 + signal.SIGTERM)
    except KeyboardInterrupt:
        fail("interrupted", label="", code=130)
    except MemoryError:
        fail(
            "not enough memory",
            hint="take smaller sizes and batches, end other programs, or use a machine with more memory",
        )
    except Exception as error:
        _fail_with(error)


def print_any_text() -> None:
    """Let stdout and stderr replace what their encoding lacks: models write characters that Latin-1 does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def catch_sigterm() -> None:
    """Let SIGTERM end the process as Ctrl-C does: what was begun is cleaned up on the way out.

    For the process's own entry point: a program that calls trimtab decides itself what a signal does.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


class Terminated(KeyboardInterrupt):
    """SIGTERM has come; whoever handles Ctrl-C handles it alike."""


def _terminate(number: int, _frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one would break off the cleaning up
    raise Terminated


def _fail_with(error: Exception) -> NoReturn:
    from trimtab.passes.errors import (  # here, because the package around it takes half a second to import
        REPORT,
        TrimtabError,
    )
    from trimtab.passes.os_errors import reason, remedy

    if isinstance(error, TrimtabError):
        fail(error.message, hint=error.hint)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{reason(error)}", hint=remedy(error))
    fail(
        f"unexpected {type(error).__name__}: {error}",
        hint=REPORT,
    )


def fail(message: str, *, hint: str | None = None, label: str = "error: ", code: int = 1) -> NoReturn:
    """Print one message, and a hint on a line of its own, on stderr (--debug: a traceback too); exit with `code`."""
    log.debug("traceback", exc_info=sys.exc_info()[1])
    print(f"{label}{message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def stdout_for_json() -> Iterator[None]:
    """Keep stdout for `emit_json`: what libraries print meanwhile goes to stderr."""
    global _json_stream
    _json_stream = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream = None


def emit_json(value: Any) -> None:
    """Print `value` as JSON on stdout. It must hold JSON types and finite numbers alone."""
    print(json.dumps(value, indent=2, allow_nan=False), file=_json_stream or sys.stdout, flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns on stdout; numbers to the right. The same on a terminal and in a pipe."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    for row in cells:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print("  ".join(padded).rstrip())


@contextmanager
def progress() -> Iterator[Progress]:
    """Show work on stderr: a bar for each `what` on a terminal, elsewhere a line now and then.

    Yields:
        a function to call with (what, done, total).
    """
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn(),
    )  # fmt: skip
    with bars.Progress(*columns, console=Console(stderr=True)) as display:
        tasks: dict[str, bars.TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = display.add_task(what)
            display.update(tasks[what], completed=done, total=total)

        yield report


class _Lines:
    """Progress as plain lines: at the beginning and end of each `what`, and every few seconds between."""

    def __init__(self) -> None:
        self._last: tuple[str, float] = ("", 0.0)

    def __call__(self, what: str, done: int, total: int) -> None:
        said, when = self._last
        now = time.monotonic()
        if what != said or done >= total or now - when >= _PLAIN_INTERVAL:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
            self._last = (what, now)
