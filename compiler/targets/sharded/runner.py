"""A model in shards as one engine: this process is a rank, and a launcher or this process starts the others."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from trimtab.compiler.builds.build import unchanged
from trimtab.compiler.targets.base import Runner, Steps
from trimtab.compiler.targets.sharded.crew import Crew
from trimtab.compiler.targets.sharded.group import Group, launched, require_torch
from trimtab.compiler.targets.sharded.plan import read_plan
from trimtab.compiler.targets.sharded.rank import Rank
from trimtab.passes.errors import TargetError


class ShardedRunner(Runner):
    """Runs a build in shards.

    Without a launcher, this process is rank 0 and starts the other ranks, which end with it; after a failure, the next
    call starts them again. Under torchrun, each process has the rank that torchrun assigns. All processes have to make
    the same calls with the same inputs in the same order, and each gets all outputs. Calls from several threads wait
    for each other.

    Args:
        folder: directory of the build.
        threads: CPU threads of each rank; by default the physical cores divided by the number of shards.
        as_decoded: whether every token has its own choice of neurons, however long the call is.
        manifest_hash: hash of the manifest that the build must have whenever the processes start.
    """

    def __init__(
        self,
        folder: Path,
        *,
        threads: int | None = None,
        as_decoded: bool = False,
        manifest_hash: str | None = None,
    ) -> None:
        require_torch()
        plan = read_plan(folder)
        self.inputs, self.outputs, self.shards = plan.inputs, plan.outputs, plan.shards
        threads = threads or threads_of_each(plan.shards)
        rank = int(os.environ["RANK"]) if launched() else 0
        group = Group.of_launcher(plan.shards) if launched() else None
        self._folder, self._hash, self._closed = folder.resolve(), manifest_hash, False
        arguments = {
            other: [str(self._folder), str(other), str(threads), str(int(as_decoded))]
            for other in range(1, plan.shards)
        }
        self._crew = Crew(arguments) if group is None else None
        self._rank = Rank(folder, plan, rank, threads, as_decoded=as_decoded)
        self._rank.joins.group = group
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._dropped: deque[int] = deque()  # finalizers append to it at any time
        self.starts = 0
        """Number of times the other ranks were started. A restart loses their caches."""
        if self._crew is not None:
            self._start(self._crew)

    def _start(self, crew: Crew) -> None:
        with unchanged(self._folder, self._hash) if self._hash else nullcontext():
            self._rank.joins.group = crew.start()
        self.starts += 1
        self._dropped.clear()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if set(inputs) != set(self.inputs):
            raise TargetError(f"the model takes the inputs {', '.join(self.inputs)}, not {', '.join(inputs)}")
        with self.together("run", dict(inputs)):
            return self._rank.run(inputs)

    def steps(self, batch: int, length: int) -> ShardedSteps:
        number = next(self._numbers)
        with self.together("steps", number, batch, length):
            own, starts = self._rank.steps(batch, length), self.starts
        steps = ShardedSteps(self, number, own, starts)
        weakref.finalize(steps, self._dropped.append, number)
        return steps

    @contextmanager
    def together(self, *command: Any, started: int | None = None) -> Iterator[None]:
        """Have the other ranks run `command` while the body runs the same here.

        Args:
            started: value of `starts` at the beginning of the generation that the command belongs to.

        Raises:
            TargetError: a rank failed, or was restarted since.
            BuildError: the ranks have to restart, and the build was replaced.
        """
        with self._lock:
            if self._closed:
                raise TargetError("this engine is closed", hint="load the build again")
            if self._crew is None:
                yield
                return
            if started is not None and (started != self.starts or not self._crew.running):
                raise TargetError("the processes of this engine were restarted, and their caches are lost")
            if not self._crew.running:
                self._start(self._crew)
            try:
                dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
                if dropped:
                    self._crew.send(("drop", dropped))
                self._crew.send(command)
                yield
            except BaseException as error:
                reason = self._crew.failed(error)
                if reason is error:
                    raise
                raise reason from error

    def confirm(self, manifest_hash: str) -> None:
        group = self._rank.joins.group
        if self._crew is None and group is not None and not group.same(manifest_hash):
            raise TargetError(f"{self._folder}: the ranks have loaded different builds", hint="start all of them again")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._crew is not None:
                self._crew.close()


class ShardedSteps(Steps):
    """A generation for which every rank has its own part of the cache."""

    def __init__(self, runner: ShardedRunner, number: int, own: Steps, started: int) -> None:
        self._runner, self._number, self._own, self._started = runner, number, own, started

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, dials: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        with self._runner.together("step", self._number, input_ids, attention_mask, dials, started=self._started):
            return self._own.run(input_ids, attention_mask, dials)


def threads_of_each(shards: int) -> int:
    """CPU threads of each rank: the physical cores divided by `shards`."""
    return max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1) // shards)
