"""The model that runs the build's ONNX file on tensors, for servers without Triton's ONNX Runtime backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from trimtab.compiler.inputs import check_inputs
from trimtab.compiler.packaging.triton.served.common import (
    read_dials,
    read_limits,
    read_settings,
    refusal,
    version_folder,
)
from trimtab.compiler.packaging.triton.served.session import open_session
from trimtab.passes.errors import InputError


class TritonPythonModel:
    """Runs the requests of one Triton batch in one call."""

    def initialize(self, args: Mapping[str, str]) -> None:
        settings = read_settings(args)
        self._batched: bool = settings["batched"]
        self._session = open_session(version_folder(args), settings, args["model_instance_device_id"])
        self._inputs = [tensor.name for tensor in self._session.get_inputs()]
        self._dials, self._limits = read_dials(settings["dials"]), read_limits(settings["limits"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        feeds: dict[int, dict[str, np.ndarray]] = {}
        groups: dict[Any, list[int]] = {}  # Triton batches only equal shapes, unless it is configured otherwise
        for place, request in enumerate(requests):
            try:
                feeds[place] = self._feeds(request)
            except InputError as error:
                responses[place] = refusal(error)
                continue
            groups.setdefault(self._key(place, feeds[place], request), []).append(place)
        for places in groups.values():
            answers = self._answers([feeds[place] for place in places], requests[places[0]].requested_output_names())
            for place, answer in zip(places, answers, strict=True):
                responses[place] = answer
        return responses

    def _feeds(self, request: Any) -> dict[str, np.ndarray]:
        """The inputs of `request`; a dial that the request omits has its default."""
        tensors = {name: pb.get_input_tensor_by_name(request, name) for name in self._inputs}
        feeds = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        names = [dial.name for dial in self._dials.dials if dial.name in feeds]
        dial_values = {name: feeds.pop(name).reshape(-1) for name in names}
        check_inputs(self._limits.inputs, feeds, self._limits.packed, self._limits.positions)
        return feeds | self._dials.feeds(len(next(iter(feeds.values()))), dial_values)

    def _key(self, place: int, feed: Mapping[str, np.ndarray], request: Any) -> Any:
        """A key that is equal for requests that can run in one call."""
        if not self._batched:
            return place
        return tuple(request.requested_output_names()), tuple(array.shape[1:] for array in feed.values())

    def _answers(self, feeds: list[dict[str, np.ndarray]], names: Sequence[str]) -> list[Any]:
        """A response to each request. If the joined call fails, each request runs alone, so that one faulty request
        does not fail the others.
        """
        try:
            return self._run(feeds, names)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            return [refusal(error)] if len(feeds) == 1 else [self._answers([feed], names)[0] for feed in feeds]

    def _run(self, feeds: list[dict[str, np.ndarray]], names: Sequence[str]) -> list[Any]:
        if len(feeds) == 1:
            outputs = self._session.run(list(names), feeds[0])
            return [pb.InferenceResponse([pb.Tensor(n, y) for n, y in zip(names, outputs, strict=True)])]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        outputs = self._session.run(list(names), joined)
        ends = np.cumsum([len(feed[self._inputs[0]]) for feed in feeds])[:-1]
        parts = [np.split(output, ends) for output in outputs]
        return [
            pb.InferenceResponse([pb.Tensor(n, part[i]) for n, part in zip(names, parts, strict=True)])
            for i in range(len(feeds))
        ]
