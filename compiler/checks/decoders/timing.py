"""Steps and prompts of several engines that take turns."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.timing import REST_S, Timing, interleave
from trimtab.compiler.progress import Progress

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


@dataclass(frozen=True)
class Start:
    """How an engine is started.

    Attributes:
        python, script: the interpreter, and one of the scripts in `steps`.
        path: what it opens.
        options: of the script, beside those that all have.
    """

    python: Path | str
    script: str
    path: Path
    options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def own(cls, path: Path, **options: object) -> Start:
        """A build, or with dense=True an ONNX file."""
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
        threads: of each engine that has no other option.
        seconds: for all engines together.

    Raises:
        TargetError: an engine does not come up, or fails.
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
