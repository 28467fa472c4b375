"""Text in, text out, piece by piece: a decoder with its cache, in Triton's Python backend.

Greedy requests of the same settings that Triton batched are generated together; drawn ones alone, so that a seed gives
the same answer whatever else is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb
from pydantic import ValidationError

from trimtab.compiler.data.tokenizer import Tokenizer, load_tokenizer
from trimtab.compiler.decoder_cache import Cache
from trimtab.compiler.generation.sampling import Sampling
from trimtab.compiler.generation.text import generate_text
from trimtab.compiler.packaging.triton.served.common import (
    read_dials,
    refusal,
    settings,
    strings,
    texts,
    together,
    turned,
    version_folder,
)
from trimtab.compiler.packaging.triton.served.session import open_session
from trimtab.compiler.targets.segmented.runner import SegmentedRunner
from trimtab.compiler.targets.session_segment import SessionSegment
from trimtab.passes.errors import InputError, TrimtabError

TEXT, ANSWER, REASON = "text_input", "text_output", "finish_reason"
_DRAWS = {"temperature": float, "top_k": int, "top_p": float, "seed": int}
_MAX_TOKENS = 128


@dataclass
class _Asked:
    """A request, and what it wants; no more tokens than the context leaves behind the longest of its own prompts."""

    request: Any
    prompts: list[str]
    stream: bool
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    dials: Mapping[str, np.ndarray]
    """Of the model, [prompts] each."""

    def __post_init__(self) -> None:
        self.sender = self.request.get_response_sender()

    @property
    def key(self) -> Any:
        """Equal for requests that can be generated together."""
        together = () if self.sampling.temperature == 0 else (id(self),)
        return self.max_tokens, self.stop, *together


class TritonPythonModel:
    """A decoupled model: one response where `stream` is false, one per piece where it is true."""

    def initialize(self, args: Mapping[str, str]) -> None:
        told, folder = settings(args), version_folder(args)
        tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer", told["max_tokens"])
        session = open_session(folder, told, args["model_instance_device_id"])
        segment = SessionSegment(session, cache=Cache(**told["cache"]))
        runner = SegmentedRunner([segment], segment.inputs, segment.outputs)
        dials = read_dials(told["dials"])
        self._engine: Any = SimpleNamespace(
            tokenizer=tokenizer,
            runner=runner,
            manifest=SimpleNamespace(max_tokens=told["max_tokens"], vocabulary=told["vocabulary"], all_dials=dials),
        )
        # what comes first is slow
        runner.steps(1, 2).run(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64), dials.feeds(1))

    def execute(self, requests: Sequence[Any]) -> None:
        groups: dict[Any, list[_Asked]] = {}
        for request in requests:
            if asked := _read(request, self._engine):
                groups.setdefault(asked.key, []).append(asked)
        for group in groups.values():
            try:
                self._generate(group)
            except Exception as error:  # noqa: PERF203
                for asked in group:
                    _end(asked.sender, refusal(error))

    def _generate(self, group: list[_Asked]) -> None:
        first, prompts = group[0], [prompt for asked in group for prompt in asked.prompts]
        answers: list[Any] = []
        for answers in generate_text(
            self._engine, prompts, max_tokens=first.max_tokens, sampling=first.sampling, stop=first.stop,
            dials=together([asked.dials for asked in group]),
        ):  # fmt: skip
            start = 0
            for asked in group:
                part = answers[start : start + len(asked.prompts)]
                start += len(asked.prompts)
                if asked.stream and any(answer.new for answer in part):
                    asked.sender.send(_response([answer.new for answer in part], [""] * len(part)))
            if all(asked.sender.is_cancelled() for asked in group):
                break
        start = 0
        for asked in group:
            part = answers[start : start + len(asked.prompts)]
            start += len(asked.prompts)
            said = ["" if asked.stream else answer.text for answer in part]
            _end(asked.sender, _response(said, [answer.ended or "cancelled" for answer in part]))


def _read(request: Any, engine: Any) -> _Asked | None:
    """What `request` wants; None where it is impossible, which is answered here, so that others may go on."""
    try:
        return _wanted(request, engine)
    except (TrimtabError, ValidationError) as error:
        _end(request.get_response_sender(), refusal(_brief(error)))
        return None


def _wanted(request: Any, engine: Any) -> _Asked:
    prompts = texts(request, TEXT)
    context, tokens = engine.manifest.max_tokens, engine.tokenizer.prompts(prompts)
    for ids in tokens:
        if not ids:
            raise InputError("a prompt has no tokens", hint="give at least one")
        if context is not None and len(ids) >= context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, and the model takes {context} with its answer", hint="shorten it"
            )
    draws = {n: kind(value) for n, kind in _DRAWS.items() if (value := _setting(request, n)) is not None}
    given = _setting(request, "max_tokens")
    max_tokens = _MAX_TOKENS if given is None else int(given)
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}", hint="give at least 1")
    if context is not None:  # or those that are generated together would end where the longest of all meets the context
        max_tokens = min(max_tokens, context - max(map(len, tokens)))
    stop = pb.get_input_tensor_by_name(request, "stop")
    stops = () if stop is None else tuple(text for text in texts(request, "stop") if text)
    dials = turned(request, engine.manifest.all_dials, len(prompts))
    return _Asked(request, prompts, bool(_setting(request, "stream")), max_tokens, stops, Sampling(**draws), dials)


def _setting(request: Any, name: str) -> Any:
    """The one value of an optional input, or None. It holds for all prompts of the request."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1)[0].item()


def _brief(error: Exception) -> Exception:
    if not isinstance(error, ValidationError):
        return error
    first = error.errors()[0]
    return InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _response(said: list[str], reasons: list[str]) -> Any:
    return pb.InferenceResponse([strings(ANSWER, said), strings(REASON, reasons)])


def _end(sender: Any, response: Any) -> None:
    """Send the last response of a request."""
    sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
