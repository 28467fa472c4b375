"""The model that generates text, piece by piece: a decoder with its cache, in Triton's Python backend.

Greedy requests of one Triton batch with the same settings are generated together. A sampled request is generated alone,
so that its seed gives the same answer whatever the other requests are.
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
    joined_dials,
    read_dials,
    read_settings,
    refusal,
    request_dials,
    strings,
    texts,
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
class _Request:
    """A request with its settings. `max_tokens` is at most what the context leaves after its longest prompt."""

    request: Any
    prompts: list[str]
    stream: bool
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    dials: Mapping[str, np.ndarray]
    """The model's dials, [prompts] each."""

    def __post_init__(self) -> None:
        self.sender = self.request.get_response_sender()

    @property
    def key(self) -> Any:
        """A key that is equal for requests that can be generated together."""
        own = () if self.sampling.temperature == 0 else (id(self),)
        return self.max_tokens, self.stop, *own


class TritonPythonModel:
    """A decoupled model: one response where `stream` is false, one per piece where it is true."""

    def initialize(self, args: Mapping[str, str]) -> None:
        settings, folder = read_settings(args), version_folder(args)
        tokenizer: Tokenizer = load_tokenizer(folder / "tokenizer", settings["max_tokens"])
        session = open_session(folder, settings, args["model_instance_device_id"])
        segment = SessionSegment(session, cache=Cache(**settings["cache"]))
        runner = SegmentedRunner([segment], segment.inputs, segment.outputs)
        dials = read_dials(settings["dials"])
        self._engine: Any = SimpleNamespace(
            tokenizer=tokenizer,
            runner=runner,
            manifest=SimpleNamespace(
                max_tokens=settings["max_tokens"], vocabulary=settings["vocabulary"], all_dials=dials
            ),
        )
        # The first step is slow, so it runs before any request.
        runner.steps(1, 2).run(np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64), dials.feeds(1))

    def execute(self, requests: Sequence[Any]) -> None:
        groups: dict[Any, list[_Request]] = {}
        for request in requests:
            if item := _read(request, self._engine):
                groups.setdefault(item.key, []).append(item)
        for group in groups.values():
            try:
                self._generate(group)
            except Exception as error:  # noqa: PERF203
                for item in group:
                    _end(item.sender, refusal(error))

    def _generate(self, group: list[_Request]) -> None:
        first, prompts = group[0], [prompt for item in group for prompt in item.prompts]
        answers: list[Any] = []
        for answers in generate_text(
            self._engine, prompts, max_tokens=first.max_tokens, sampling=first.sampling, stop=first.stop,
            dials=joined_dials([item.dials for item in group]),
        ):  # fmt: skip
            start = 0
            for item in group:
                part = answers[start : start + len(item.prompts)]
                start += len(item.prompts)
                if item.stream and any(answer.new for answer in part):
                    item.sender.send(_response([answer.new for answer in part], [""] * len(part)))
            if all(item.sender.is_cancelled() for item in group):
                break
        start = 0
        for item in group:
            part = answers[start : start + len(item.prompts)]
            start += len(item.prompts)
            whole_texts = ["" if item.stream else answer.text for answer in part]
            _end(item.sender, _response(whole_texts, [answer.ended or "cancelled" for answer in part]))


def _read(request: Any, engine: Any) -> _Request | None:
    """Read `request`. If it is invalid, answer with the error and return None, so that the others continue."""
    try:
        return _parse(request, engine)
    except (TrimtabError, ValidationError) as error:
        _end(request.get_response_sender(), refusal(_brief(error)))
        return None


def _parse(request: Any, engine: Any) -> _Request:
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
    requested = _setting(request, "max_tokens")
    max_tokens = _MAX_TOKENS if requested is None else int(requested)
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}", hint="give at least 1")
    if context is not None:  # otherwise the longest prompt of a group would limit all answers of the group
        max_tokens = min(max_tokens, context - max(map(len, tokens)))
    stop = pb.get_input_tensor_by_name(request, "stop")
    stops = () if stop is None else tuple(text for text in texts(request, "stop") if text)
    dials = request_dials(request, engine.manifest.all_dials, len(prompts))
    return _Request(request, prompts, bool(_setting(request, "stream")), max_tokens, stops, Sampling(**draws), dials)


def _setting(request: Any, name: str) -> Any:
    """The value of an optional input, for all prompts of the request; None if it is missing."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy().reshape(-1)[0].item()


def _brief(error: Exception) -> Exception:
    if not isinstance(error, ValidationError):
        return error
    first = error.errors()[0]
    return InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")


def _response(answers: list[str], reasons: list[str]) -> Any:
    return pb.InferenceResponse([strings(ANSWER, answers), strings(REASON, reasons)])


def _end(sender: Any, response: Any) -> None:
    """Send the last response of a request."""
    sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
