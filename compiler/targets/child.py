"""Run a TensorRT builder in a process of its own: it has been seen to abort, and to take hours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trimtab.compiler.processes import end_with_parent, ending, tail
from trimtab.passes.errors import TargetError


def run_child(name: str, job: dict[str, Any], *, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
    """Have `build_engine` do `job`, and return its answer.

    Args:
        name: of the target, for messages.
        job: what to do, as `build_engine` documents it; JSON types only.
        timeout_s: seconds after which the process is killed.
        env: environment variables it gets besides ours.

    Raises:
        TargetError: it crashed, failed or took too long; shows the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-") as scratch:
        job_file, answer, log = (Path(scratch) / file for file in ("job.json", "answer.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        with log.open("wb") as output:
            try:
                code = subprocess.run(
                    command(job_file, answer),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | env,
                    preexec_fn=end_with_parent(),
                    timeout=timeout_s,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired as error:
                raise TargetError(
                    f"{name}: gave up building after {timeout_s:g} s{tail(log)}",
                    hint="allow more time, or narrow the workload",
                ) from error
        if code or not answer.is_file():
            how = ending(code)
            raise TargetError(f"{name}: the builder {how.words}{tail(log)}", hint=how.hint)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def command(job: Path, answer: Path) -> list[str]:
    """The command line of the child."""
    return [sys.executable, "-m", "trimtab.compiler.targets.tensorrt.build_engine", str(job), str(answer)]
