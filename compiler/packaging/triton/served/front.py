"""The text model: from texts or pairs to labels, scores or embeddings. It calls the engine once per Triton batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import load_tokenizer
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
from trimtab.compiler.task import Task
from trimtab.passes.errors import InputError, TargetError, TrimtabError

TEXT, TEXT_PAIR = "TEXT", "TEXT_PAIR"
LABEL, LABELS, PROBABILITIES, SCORE, EMBEDDING = "LABEL", "LABELS", "PROBABILITIES", "SCORE", "EMBEDDING"
_LIKELY = 0.5  # probability above which a label is returned, if a text has any number of labels


class TritonPythonModel:
    """The setting "kind", the kind of the model's `Task`, determines the outputs."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._settings, folder = read_settings(args), version_folder(args)
        self._task = Task(self._settings["kind"], self._settings["output"], self._settings["activation"])
        self._dials = read_dials(self._settings["dials"])
        self._tokenizer = load_tokenizer(folder / "tokenizer", self._settings["max_tokens"])
        self._session: Any = None
        engine_folder = folder.parents[1] / self._settings["engine"] / folder.name
        if (
            self._settings["session"] is not None and engine_folder.is_dir()
        ):  # the folder is missing if Triton fetches each model separately
            from trimtab.compiler.packaging.triton.served.session import open_session

            self._session = open_session(engine_folder, self._settings["session"], args["model_instance_device_id"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        accepted: dict[int, list[Text]] = {}
        dials: list[dict[str, np.ndarray]] = []
        for place, request in enumerate(requests):
            try:
                group = self._texts(request)
                dials.append(request_dials(request, self._dials, len(group), str.upper))
                accepted[place] = group
            except TrimtabError as error:  # noqa: PERF203
                responses[place] = refusal(error)
        if accepted:
            try:
                rows = self._answer([text for group in accepted.values() for text in group], joined_dials(dials))
            except Exception as error:
                return [response or refusal(error) for response in responses]
            start = 0
            for place, group in accepted.items():
                responses[place] = self._respond(rows[start : start + len(group)])
                start += len(group)
        return responses

    def _texts(self, request: Any) -> list[Text]:
        batch: list[Text] = list(texts(request, TEXT))
        if pb.get_input_tensor_by_name(request, TEXT_PAIR) is not None:
            second = texts(request, TEXT_PAIR)
            if len(second) != len(batch):
                raise InputError(
                    f"{TEXT} has {len(batch)} rows and {TEXT_PAIR} {len(second)}",
                    hint=f"send one {TEXT_PAIR} for each {TEXT}",
                )
            batch = list(zip(texts(request, TEXT), second, strict=True))
        # A tokenizer without special tokens makes no tokens of some texts, and the mean of no tokens is NaN.
        if self._settings["special_tokens"]:
            return batch
        if not self._tokenizer.encode(batch, self._settings["tokens"][1])["attention_mask"].any(1).all():
            raise InputError("a text is empty: its tokenizer makes no tokens of it", hint="send at least one word")
        return batch

    def _answer(self, batch: list[Text], dials: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of the engine for the answers, [texts, width].

        Args:
            dials: [texts] each.
        """
        settings = self._settings
        feeds = self._tokenizer.encode(batch, settings["tokens"][1])
        short = settings["tokens"][0] - feeds["input_ids"].shape[1]
        if short > 0:  # engines have a minimum size; the mask hides the padding
            feeds = {name: np.pad(value, ((0, 0), (0, short))) for name, value in feeds.items()}
        rows = len(batch)
        if rows < settings["least_batch"]:
            feeds = {name: np.resize(value, (settings["least_batch"], value.shape[1])) for name, value in feeds.items()}
            dials = {name: np.resize(value, settings["least_batch"]) for name, value in dials.items()}
        if "position_ids" in settings["inputs"]:
            feeds["position_ids"] = np.broadcast_to(np.arange(feeds["input_ids"].shape[1]), feeds["input_ids"].shape)
        inputs = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in settings["inputs"].items()}
        inputs |= dials
        output = self._ask(inputs) if self._session is None else self._session.run([settings["output"]], inputs)[0]
        if settings["kind"] == "states":
            weight = feeds["attention_mask"][..., None] != 0
            output = (output * weight).sum(1, dtype=np.float32) / weight.sum(1)
        return np.asarray(output[:rows], np.float32)

    def _ask(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The engine's output, from a request to the engine's model."""
        output = self._settings["output"]
        request = pb.InferenceRequest(
            model_name=self._settings["engine"],
            requested_output_names=[output],
            inputs=[pb.Tensor(name, value) for name, value in inputs.items()],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),  # for engines on a GPU
        )
        response = request.exec()
        if response.has_error():
            raise TargetError(response.error().message())
        values: np.ndarray = pb.get_output_tensor_by_name(response, output).as_numpy()
        return values

    def _respond(self, rows: np.ndarray) -> Any:
        kind = self._task.kind
        if kind not in ("classes", "labels", "score"):
            return pb.InferenceResponse([pb.Tensor(EMBEDDING, np.ascontiguousarray(rows))])
        values = self._task.apply(rows)
        if kind == "score":
            return pb.InferenceResponse([pb.Tensor(SCORE, np.ascontiguousarray(values))])
        if kind == "classes":
            names = strings(LABEL, [self._name(best) for best in rows.argmax(-1)])
        else:
            likely = [[self._name(place) for place in np.flatnonzero(row > _LIKELY)] for row in values]
            names = strings(LABELS, [json.dumps(each, ensure_ascii=False) for each in likely])
        return pb.InferenceResponse([names, pb.Tensor(PROBABILITIES, np.ascontiguousarray(values))])

    def _name(self, place: Any) -> str:
        """The name of a class, or its number if it has no name."""
        names = self._settings["labels"]
        return names[place] if place < len(names) else str(place)
