"""Trains routers in a process of its own, `python learner.py OUT SETTINGS [STAGE STEP]`, which kills itself there."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from safetensors.numpy import save_file


def learn(
    folder: Path, out: str, settings: dict[str, Any], progress: Callable[[str, int, int], None] | None = None
) -> Any:
    """Train `model` of `folder` on its `texts.jsonl`; weights and routers go into one file, without a Profile."""
    from trimtab.training.run import train

    def write(routed: Any, checkpoint: Any, record: Any, job: Any, out: Path) -> None:
        weights = {name: value.numpy().copy() for name, value in routed.model.state_dict().items()}
        save_file(weights | routed.routing.tensors(), out)

    with mock.patch("trimtab.training.lte.learn.write_result", write):
        return train(
            "lte", folder / "model", folder / "texts.jsonl", folder / out, settings=settings, progress=progress
        )


def main(out: str, settings: str, stage: str = "", step: str = "0") -> None:
    def progress(what: str, done: int, total: int) -> None:
        if what == stage and done >= int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    trained = learn(Path(), out, json.loads(settings), progress)
    if trained is not None:  # of several processes the first has it
        print(json.dumps(trained.record))


if __name__ == "__main__":
    main(*sys.argv[1:])
