"""Starts, commands and ends the processes of the other ranks. They end with the process that started them."""

from __future__ import annotations

import pickle
import select
import subprocess
import sys
import time
import weakref
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from trimtab.compiler.processes import ending, tail
from trimtab.compiler.targets.sharded.group import LOCAL, Group, require_torch, timeout_s
from trimtab.passes.errors import TargetError, TrimtabError
from trimtab.passes.temporary import temporary_folder

READY = b"ready\n"
_START_S = 120.0  # shortest time limit for loading
_LEAVE_S = 5.0  # time limit for a process to end by itself
_NOTICE_S = 2.0  # time within which the system reports the end of a process


class Crew:
    """Processes of the ranks 1 to size - 1. They end when this process does, however it ends.

    Args:
        arguments: rank → arguments of the worker's command line.
    """

    def __init__(self, arguments: dict[int, list[str]]) -> None:
        self._arguments, self._size = arguments, len(arguments) + 1
        stack = ExitStack()
        self._log = stack.enter_context(temporary_folder("shards"))
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        weakref.finalize(self, _end, self._workers, stack)

    @property
    def running(self) -> bool:
        return bool(self._workers)

    def start(self) -> Group:
        """Start the processes; returns the group of all ranks, for rank 0.

        Raises:
            TargetError: a process did not start.
        """
        store = require_torch().TCPStore(
            LOCAL, 0, self._size, True, timedelta(seconds=timeout_s()), wait_for_workers=False
        )
        for rank, arguments in self._arguments.items():
            with open(self._log_of(rank), "wb") as log:
                self._workers[rank] = subprocess.Popen(
                    [sys.executable, "-m", "trimtab.compiler.targets.sharded.worker", *arguments, str(store.port)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        try:
            deadline = time.monotonic() + max(_START_S, timeout_s())
            for rank, worker in self._workers.items():
                assert worker.stdout is not None
                self._await(rank, worker.stdout, deadline)
            return Group.of_store(store, 0, self._size)
        except BaseException as error:
            reason = self.failed(error)
            if reason is error:
                raise
            raise reason from error

    def _await(self, rank: int, stdout: IO[bytes], deadline: float) -> None:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([stdout], [], [], left)[0]:
            raise TargetError(
                f"rank {rank} did not load its part of the model in time", hint="TRIMTAB_SHARD_TIMEOUT allows more"
            )
        if stdout.readline() != READY:
            raise EOFError(f"rank {rank}")

    def send(self, command: tuple[Any, ...]) -> None:
        """Send `command` to every rank, in the format of `worker`.

        Raises:
            OSError: a process has ended.
        """
        message = pickle.dumps(command, protocol=5)
        for worker in self._workers.values():
            assert worker.stdin is not None
            worker.stdin.write(message)
            worker.stdin.flush()

    def failed(self, error: BaseException) -> BaseException:
        """End all processes after `error`; returns the error to raise, which names the cause where it is known."""
        explained = isinstance(error, TrimtabError) or not isinstance(error, Exception)
        ended = None if explained else self._ended()
        _end(self._workers, None, at_once=True)
        if ended is not None:
            rank, code = ended
            how = ending(code)
            hint = f"the next call starts it again; {how.hint}" if how.hint else None
            return TargetError(f"the process of rank {rank} {how.words}{tail(self._log_of(rank))}", hint=hint)
        if isinstance(error, RuntimeError):  # of torch.distributed
            return TargetError(
                f"the ranks lost each other ({' '.join(str(error).split())[:200]})",
                hint=f"one of them did not answer for {timeout_s():g} s; TRIMTAB_SHARD_TIMEOUT allows more",
            )
        return error

    def _ended(self) -> tuple[int, int] | None:
        """Rank and exit code of a process that has ended by itself; None if all run."""
        deadline = time.monotonic() + _NOTICE_S
        while self._workers and time.monotonic() < deadline:
            for rank, worker in self._workers.items():
                if worker.poll() is not None:
                    return rank, worker.returncode
            time.sleep(0.02)
        return None

    def close(self) -> None:
        _end(self._workers, None)

    def _log_of(self, rank: int) -> Path:
        return self._log / f"rank{rank}.txt"


def _end(workers: dict[int, subprocess.Popen[bytes]], log: ExitStack | None, *, at_once: bool = False) -> None:
    """End `workers`: they exit when their stdin is closed."""
    for worker in workers.values():
        if at_once:
            worker.kill()
        with suppress(OSError):  # data left in the buffer can no longer be sent
            worker.stdin.close()  # type: ignore[union-attr]
    for worker in workers.values():
        try:
            worker.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()  # type: ignore[union-attr]
    workers.clear()
    if log is not None:
        log.close()
