"""Steps and prompts of several engines that take turns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.timing import REST_S, Timing, interleave
from trimtab.compiler.progress import Progress

_PROMPTS = 0.3  # share of the time: a prompt takes longer than a step, and fewer samples are enough


@dataclass(frozen=True)
class DecoderTiming:
    """Times and memory of one engine.

    Attributes:
        prompt: times of the whole prompt, up to the logits of the first token.
        step: times of one further token, behind the prompt.
        resident_bytes: RSS of the engine's process: weights, cache, runtime and interpreter.
    """

    prompt: Timing
    step: Timing
    resident_bytes: int


@dataclass(frozen=True)
class Start:
    """The way to start an engine.

    Attributes:
        python, script: the interpreter, and one of the scripts in `steps`.
        path: the model or build that the script opens.
        options: options of the script, beside those that all scripts have.
    """

    python: Path | str
    script: str
    path: Path
    options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def own(cls, path: Path, **options: object) -> Start:
        """The start of a build, or with dense=True of an ONNX file."""
        return cls(sys.executable, "trimtab_steps.py", path, options)


def time_decoders(
    engines: Mapping[str, Start],
    *,
    context: int,
    vocabulary: int,
    threads: int,
    seconds: float,
    progress: Progress | None = None,
) -> dict[str, DecoderTiming]:
    """Time all `engines`, each in a process of its own, on the same random tokens.

    Args:
        context: tokens of a prompt, and in the cache when a step is timed.
        threads: threads of each engine without a `threads` option of its own.
        seconds: time budget for all engines together.

    Raises:
        TargetError: an engine does not start, or fails.
    """
    with Children() as children:
        for done, (name, start) in enumerate(engines.items()):
            if progress:
                progress("start engines", done, len(engines))
            options = {"threads": threads, "context": context, "vocabulary": vocabulary, **start.options}
            children.start(name, start.python, start.script, path=start.path, **options)
        if progress:
            progress("start engines", len(engines), len(engines))
        steps = interleave(children.steps, seconds=(1 - _PROMPTS) * seconds, block=10, rest=REST_S)
        prompts = interleave(children.prompts, seconds=_PROMPTS * seconds, block=2, warmup=1, rest=REST_S)
        return {name: DecoderTiming(prompts[name], steps[name], children.resident_bytes(name)) for name in engines}
