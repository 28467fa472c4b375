"""Text generation: from prompts to answers, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trimtab.compiler.generation.generator import NONE, generate
from trimtab.compiler.generation.sampling import Sampling
from trimtab.passes.errors import InputError

if TYPE_CHECKING:  # a Triton repository carries this module, without what compiles
    from trimtab.compiler.engine import Engine
    from trimtab.passes.dials import Setting

_UNFINISHED = "\ufffd"  # a tokenizer decodes an incomplete character to this


@dataclass
class Answer:
    """The answer to one prompt so far.

    Attributes:
        tokens: token ids.
        text: text of the tokens, without the end token.
        new: the end of `text` that this step added; text that may become a stop text is held back.
        ended: why the answer ended: a "stop" token or text, or the maximum "length"; None while it continues.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    new: str = ""
    ended: Literal["stop", "length"] | None = None


def generate_text(
    engine: Engine, prompts: Sequence[str], *, max_tokens: int = 128, sampling: Sampling | None = None,
    stop: Sequence[str] = (), dials: Mapping[str, Setting] | None = None, speed: Setting | None = None,
) -> Iterator[list[Answer]]:  # fmt: skip
    """Yield the answers to `prompts` after each step.

    Args:
        max_tokens: maximum number of new tokens per answer.
        stop: texts that end an answer and are cut from it; the model's end-of-text tokens always end it.
        dials, speed: as in `Engine.run`; one number, or one per prompt.

    Raises:
        ModelError: the build has no tokenizer.
        InputError: a prompt is not a text, or is longer than the model's context; a stop text is no text, or empty.
        TargetError: the build does not generate text.
    """
    tokenizer = engine.tokenizer
    _check_stops(stop)
    ids = tokenizer.prompts(prompts)
    dial_values = engine.manifest.all_dials.feeds(len(ids), dials, speed)
    answers = [Answer() for _ in ids]

    def decode(row: int) -> str:
        """The answer's text, decoded after the prompt's last token, because a tokenizer trims the start of a text."""
        before = ids[row][-1:]
        return tokenizer.decode(before + answers[row].tokens)[len(tokenizer.decode(before)) :]

    steps = generate(
        engine.runner, ids, max_new_tokens=max_tokens, sampling=sampling,
        stop=tokenizer.end_ids, context=engine.manifest.max_tokens, pad=tokenizer.pad_id,
        vocabulary=engine.manifest.vocabulary, dials=dial_values,
    )  # fmt: skip
    for tokens in steps:
        for row, (answer, token) in enumerate(zip(answers, tokens.tolist(), strict=True)):
            answer.new = ""
            if answer.ended is None and token != NONE:
                answer.tokens.append(token)
                _grow(answer, decode(row), token in tokenizer.end_ids, stop)
        yield answers
        if all(answer.ended for answer in answers):
            return
    for row, answer in enumerate(answers):
        answer.new = ""
        if answer.ended is None:
            whole = decode(row)
            answer.new, answer.text, answer.ended = whole[len(answer.text) :], whole, "length"
    yield answers


def _check_stops(stop: Sequence[str]) -> None:
    hint = 'give a list of texts, such as ["\\n\\n"]; no list ends answers at the model\'s own tokens alone'
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise InputError(f"stop is of type {type(stop).__name__}, not a list of texts", hint=hint)
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop holds {text!r}, which is no text that an answer could have", hint=hint)


def _grow(answer: Answer, whole: str, at_end: bool, stop: Sequence[str]) -> None:
    """Add to `answer` the part of its text `whole` that further tokens cannot change."""
    cuts = [place for text in stop if (place := whole.find(text)) >= 0]
    if cuts:
        certain, answer.ended = whole[: min(cuts)], "stop"
    elif at_end:
        certain, answer.ended = whole, "stop"
    else:
        certain = whole.rstrip(_UNFINISHED)
        certain = certain[: len(certain) - max((_overlap(certain, text) for text in stop), default=0)]
    if len(certain) > len(answer.text):
        answer.new, answer.text = certain[len(answer.text) :], certain


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` that may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
