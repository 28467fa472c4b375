"""The process of one rank: `python -m trimtab.compiler.targets.sharded.worker FOLDER RANK THREADS DECODED PORT`.

Commands come through stdin, pickled by the process that started this one:

    ("run", inputs)                 run the model once
    ("steps", number, batch, size)  begin generation `number`
    ("step", number, ids, mask, dials)  run one step of generation `number`
    ("drop", numbers)               forget generations

The worker answers only through the group, and exits at the end of stdin.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from datetime import timedelta
from pathlib import Path

from trimtab.compiler.targets.base import Steps
from trimtab.compiler.targets.sharded.crew import READY
from trimtab.compiler.targets.sharded.group import LOCAL, Group, require_torch, timeout_s
from trimtab.compiler.targets.sharded.plan import read_plan
from trimtab.compiler.targets.sharded.rank import Rank
from trimtab.passes.errors import TrimtabError


def main(folder: str, rank: str, threads: str, as_decoded: str, port: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to the log
    plan = read_plan(Path(folder))
    own = Rank(Path(folder), plan, int(rank), int(threads), as_decoded=as_decoded == "1")
    store = require_torch().TCPStore(LOCAL, int(port), plan.shards, False, timedelta(seconds=timeout_s()))
    answer.write(READY)
    answer.flush()
    own.joins.group = Group.of_store(store, int(rank), plan.shards)
    _serve(own)


def _serve(own: Rank) -> None:
    generations: dict[int, Steps] = {}
    while True:
        try:
            what, *values = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if what == "run":
            own.run(values[0])
        elif what == "steps":
            generations[values[0]] = own.steps(*values[1:])
        elif what == "step":
            generations[values[0]].run(*values[1:])
        elif what == "drop":
            for number in values[0]:
                generations.pop(number, None)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TrimtabError as error:
        sys.exit(str(error))
    except RuntimeError as error:  # the group is gone, and with it the process that sends the commands
        sys.exit(f"{type(error).__name__}: {error}")
