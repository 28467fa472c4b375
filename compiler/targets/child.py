"""Run a TensorRT builder in a process of its own: it has been seen to abort, and to take hours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimtab.compiler.processes import end_with_parent, ending, tail
from trimtab.passes.errors import TargetError
from trimtab.passes.temporary import temporary_folder

_ERROR = re.compile(r"\[E\] (.*\S)")
"""TensorRT's errors, as Polygraphy's logger writes them."""

_EXCEPTION = re.compile(r"[\w.]+(?:Error|Exception): (.*\S)")
"""The last line of a traceback."""

_REASONS = 3  # errors shown: the first is the cause
_WIDTH = 600  # characters shown of one
_HINT = (
    "the reason is the builder's: change what it names in the model (precision, opset, sizes), or choose "
    "--target onnxruntime"
)


def run_child(name: str, job: dict[str, Any], *, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
    """Have `build_engine` do `job`, and return its answer.

    Args:
        name: of the target, for messages.
        job: what to do, as `build_engine` documents it; JSON types only.
        timeout_s: seconds after which the process is killed.
        env: environment variables it gets besides ours.

    Raises:
        TargetError: it crashed, failed or took too long; shows its errors, or the end of its log.
    """
    with temporary_folder("build") as scratch:
        job_file, answer, log = (scratch / file for file in ("job.json", "answer.json", "log.txt"))
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
            reason = "\n  ".join(["", *reasons(log)]) or tail(log)
            raise TargetError(f"{name}: the builder {how.words}{reason}", hint=how.hint or _HINT)
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def reasons(log: Path) -> list[str]:
    """The builder's own errors in its log, without what Python says of where they were met; [] if there are none.

    TensorRT writes `[E] IBuilder::...: Error Code 4: ...`; whatever went wrong before it was asked is an exception.
    """
    lines = log.read_text(errors="replace").splitlines()
    exceptions = [match[1] for line in lines if (match := _EXCEPTION.match(line))]
    found = [match[1] for line in lines if (match := _ERROR.match(line))] or exceptions[-1:]
    return [line[:_WIDTH] for line in dict.fromkeys(found)][:_REASONS]


def command(job: Path, answer: Path) -> list[str]:
    """The command line of the child."""
    return [sys.executable, "-m", "trimtab.compiler.targets.tensorrt.build_engine", str(job), str(answer)]
