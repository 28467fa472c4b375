"""Runs a TensorRT builder in a process of its own: the builder can abort, or take hours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimtab.compiler.processes import ending, run_logged, tail
from trimtab.passes.errors import TargetError
from trimtab.passes.temporary import temporary_folder

_ERROR = re.compile(r"\[E\] (.*\S)")
"""TensorRT's errors, as Polygraphy's logger writes them."""

_EXCEPTION = re.compile(r"[\w.]+(?:Error|Exception): (.*\S)")
"""The last line of a Python traceback."""

_REASONS = 3  # errors shown: the first is the cause
_WIDTH = 600  # characters shown of each error
_HINT = (
    "the reason is the builder's: change what it names in the model (precision, opset, sizes), or choose "
    "--target onnxruntime"
)


def run_child(name: str, job: dict[str, Any], *, timeout_s: float, env: dict[str, str]) -> dict[str, Any]:
    """Run `job` in `build_engine`, and return its answer.

    Args:
        name: name of the target, for messages.
        job: the job, in the format of `build_engine`; JSON types only.
        timeout_s: seconds after which the process is killed.
        env: environment variables of the process, in addition to ours.

    Raises:
        TargetError: the process crashed, failed or took too long; shows its errors, or the end of its log.
    """
    with temporary_folder("build") as scratch:
        job_file, answer_file, log = (scratch / file for file in ("job.json", "answer.json", "log.txt"))
        job_file.write_text(json.dumps(job))
        try:
            code = run_logged(command(job_file, answer_file), log, env=env, timeout_s=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"{name}: gave up building after {timeout_s:g} s{tail(log)}",
                hint="allow more time, or narrow the workload",
            ) from error
        if code or not answer_file.is_file():
            how = ending(code)
            reason = "\n  ".join(["", *reasons(log)]) or tail(log)
            raise TargetError(f"{name}: the builder {how.words}{reason}", hint=how.hint or _HINT)
        answer: dict[str, Any] = json.loads(answer_file.read_text())
        return answer


def reasons(log: Path) -> list[str]:
    """The builder's own errors in its log, without Python's traceback; [] if there are none.

    TensorRT writes `[E] IBuilder::...: Error Code 4: ...`; a failure before TensorRT runs is an exception.
    """
    lines = log.read_text(errors="replace").splitlines()
    exceptions = [match[1] for line in lines if (match := _EXCEPTION.match(line))]
    errors = [match[1] for line in lines if (match := _ERROR.match(line))] or exceptions[-1:]
    return [line[:_WIDTH] for line in dict.fromkeys(errors)][:_REASONS]


def command(job: Path, answer: Path) -> list[str]:
    """The command line of the child."""
    return [sys.executable, "-m", "trimtab.compiler.targets.tensorrt.build_engine", str(job), str(answer)]
