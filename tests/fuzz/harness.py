"""Runs damaged inputs and sorts what came of them: an answer, one of trimtab's own errors, or a raw one."""

from __future__ import annotations

import re
import shutil
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kinds import KINDS

from trimtab.passes.errors import PassError, TrimtabError

LONGEST_S = 20.0
"""Of a case; sound ones take less than one second."""

_RAW = re.compile(
    r"Traceback|\[ONNXRuntime|NoneType|object at 0x|numpy\.(?!savez)|<class|"
    r"\b(Value|Type|Key|Index|Attribute|Recursion|Overflow|ZeroDivision|OS|Runtime|Memory|Unicode\w+|Import|Assertion|"
    r"NotImplemented|Validation)Error\b|StopIteration|\w+Exception\b"
)
"""A library's own words in a message."""

_LONGEST = 2500  # characters of a message


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        kind, seed: what it was; `run(kind, seed, folder)` has it again.
        fault: None for an answer or a clean refusal; else what is wrong.
        said: the error.
        seconds: it took.
    """

    kind: str
    seed: int
    fault: str | None
    said: str
    seconds: float


def run(kind: str, seed: int, root: Path) -> Outcome:
    """Run the case number `seed` of a kind, in a folder below `root` that is removed again."""
    folder = root / f"{kind}-{seed}"
    folder.mkdir(parents=True)
    start, fault, said = time.perf_counter(), None, ""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            KINDS[kind](np.random.default_rng([sum(kind.encode()), seed]), folder)
    except TrimtabError as error:
        said = str(error)
        fault = _fault_of(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        fault = f"{type(error).__name__} at {_place(error)}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds = time.perf_counter() - start
    if fault is None and seconds > LONGEST_S:
        fault = f"took {seconds:.0f} s"
    return Outcome(kind, seed, fault, " ".join(said.split())[:300], seconds)


def _fault_of(error: TrimtabError) -> str | None:
    """What is wrong with a refusal, or None."""
    text = str(error)
    cause = error.__cause__
    if isinstance(error, PassError) and cause is not None and not isinstance(cause, TrimtabError):
        return f"{type(cause).__name__} at {_place(cause)}"
    raw = _RAW.search(text)
    if raw is not None:
        return f"says {raw[0]!r}, raised at {_place(error)}"
    if len(text) > _LONGEST:
        return f"{len(text)} characters, raised at {_place(error)}"
    return None


def _place(error: BaseException) -> str:
    """The last place in trimtab that an error went through."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if re.search(r"/(compiler|passes|plugins)/", f.filename)
    ]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    return f"{'/'.join(Path(own[-1].filename).parts[-3:])}:{own[-1].lineno}" if own else "outside of trimtab"
