"""Steps and prompts of several engines that take turns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.timing import REST_S, Timing, interleave
from trimtab.compiler.phases import Progress

_PROMPTS = 0.3  # of the time: a prompt takes longer than a step, and fewer say enough


@dataclass(frozen=True)
class DecoderTiming:
    """One engine.

    Attributes:
        prompt: of reading the whole prompt, up to the logits of the first token.
        step: of one token more, behind as many as the prompt has.
        resident_bytes: what its process holds: weights, cache, runtime and interpreter.
    """

    prompt: Timing
    step: Timing
    resident_bytes: int


Engine = tuple[Path | str, str, Path]
"""Interpreter, script, and what it opens."""


def own(path: Path) -> Engine:
    """A build, or a dense ONNX file."""
    return sys.executable, "trimtab_steps.py", path


def time_decoders(
    engines: Mapping[str, Engine],
    *,
    context: int,
    vocabulary: int,
    batch: int,
    threads: int,
    seconds: float,
    options: Mapping[str, Mapping[str, object]] | None = None,
    progress: Progress | None = None,
) -> dict[str, DecoderTiming]:
    """Time all `engines`, each in a process of its own, on the same random tokens.

    Args:
        context: tokens of a prompt, and in the cache when a step is timed.
        batch: texts that are continued together.
        threads: of each engine.
        seconds: for all engines together.
        options: of an engine's script, by its name.

    Raises:
        TargetError: an engine does not come up, or fails.
    """
    with Children() as children:
        for done, (name, (python, script, path)) in enumerate(engines.items()):
            if progress:
                progress("start engines", done, len(engines))
            more = dict((options or {}).get(name, {}))
            more |= {"batch": batch} if script == "trimtab_steps.py" else {}
            children.start(
                name, python, script, path=path, threads=threads, context=context, vocabulary=vocabulary, **more
            )
        if progress:
            progress("start engines", len(engines), len(engines))
        steps = interleave(children.steps, seconds=(1 - _PROMPTS) * seconds, block=10, rest=REST_S)
        prompts = interleave(children.prompts, seconds=_PROMPTS * seconds, block=2, warmup=1, rest=REST_S)
        return {name: DecoderTiming(prompts[name], steps[name], children.resident_bytes(name)) for name in engines}
