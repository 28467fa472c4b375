"""Texts or pairs in; labels, scores or embeddings out: tokenizes all that Triton batched, and asks the engine once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import load_tokenizer
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
from trimtab.compiler.task import Task
from trimtab.passes.errors import InputError, TargetError, TrimtabError

TEXT, TEXT_PAIR = "TEXT", "TEXT_PAIR"
LABEL, LABELS, PROBABILITIES, SCORE, EMBEDDING = "LABEL", "LABELS", "PROBABILITIES", "SCORE", "EMBEDDING"
_LIKELY = 0.5  # probability over which a label is given, where a text has any number of them


class TritonPythonModel:
    """What it answers is said by "kind", that of the model's `Task`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._told, folder = settings(args), version_folder(args)
        self._task = Task(self._told["kind"], self._told["output"], self._told["activation"])
        self._dials = read_dials(self._told["dials"])
        self._tokenizer = load_tokenizer(folder / "tokenizer", self._told["max_tokens"])
        self._session: Any = None
        beside = folder.parents[1] / self._told["engine"] / folder.name
        if self._told["session"] is not None and beside.is_dir():  # not where Triton fetches each model by itself
            from trimtab.compiler.packaging.triton.served.session import open_session

            self._session = open_session(beside, self._told["session"], args["model_instance_device_id"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        responses: list[Any] = [None] * len(requests)
        given: dict[int, list[Text]] = {}
        asked: list[dict[str, np.ndarray]] = []
        for place, request in enumerate(requests):
            try:
                group = self._texts(request)
                asked.append(turned(request, self._dials, len(group), str.upper))
                given[place] = group
            except TrimtabError as error:  # noqa: PERF203
                responses[place] = refusal(error)
        if given:
            try:
                rows = self._answer([text for group in given.values() for text in group], together(asked))
            except Exception as error:
                return [response or refusal(error) for response in responses]
            start = 0
            for place, group in given.items():
                responses[place] = self._respond(rows[start : start + len(group)])
                start += len(group)
        return responses

    def _texts(self, request: Any) -> list[Text]:
        found: list[Text] = list(texts(request, TEXT))
        if pb.get_input_tensor_by_name(request, TEXT_PAIR) is not None:
            second = texts(request, TEXT_PAIR)
            if len(second) != len(found):
                raise InputError(
                    f"{TEXT} has {len(found)} rows and {TEXT_PAIR} {len(second)}",
                    hint=f"send one {TEXT_PAIR} for each {TEXT}",
                )
            found = list(zip(texts(request, TEXT), second, strict=True))
        # Without tokens of its own, a tokenizer leaves nothing of some texts, and the mean of nothing is no number.
        if self._told["special_tokens"]:
            return found
        if not self._tokenizer.encode(found, self._told["tokens"][1])["attention_mask"].any(1).all():
            raise InputError("a text is empty: its tokenizer makes no tokens of it", hint="send at least one word")
        return found

    def _answer(self, batch: list[Text], dials: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of the engine that is answered with, [texts, width].

        Args:
            dials: [texts] each.
        """
        told = self._told
        feeds = self._tokenizer.encode(batch, told["tokens"][1])
        short = told["tokens"][0] - feeds["input_ids"].shape[1]
        if short > 0:  # engines have a least size; the mask hides what fills up
            feeds = {name: np.pad(value, ((0, 0), (0, short))) for name, value in feeds.items()}
        rows = len(batch)
        if rows < told["least_batch"]:
            feeds = {name: np.resize(value, (told["least_batch"], value.shape[1])) for name, value in feeds.items()}
            dials = {name: np.resize(value, told["least_batch"]) for name, value in dials.items()}
        if "position_ids" in told["inputs"]:
            feeds["position_ids"] = np.broadcast_to(np.arange(feeds["input_ids"].shape[1]), feeds["input_ids"].shape)
        given = {name: np.ascontiguousarray(feeds[name], dtype) for name, dtype in told["inputs"].items()}
        given |= dials
        found = self._ask(given) if self._session is None else self._session.run([told["output"]], given)[0]
        if told["kind"] == "states":
            weight = feeds["attention_mask"][..., None] != 0
            found = (found * weight).sum(1, dtype=np.float32) / weight.sum(1)
        return np.asarray(found[:rows], np.float32)

    def _ask(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """The engine's output, from the model that holds it."""
        output = self._told["output"]
        asked = pb.InferenceRequest(
            model_name=self._told["engine"],
            requested_output_names=[output],
            inputs=[pb.Tensor(name, value) for name, value in given.items()],
            preferred_memory=pb.PreferredMemory(pb.TRITONSERVER_MEMORY_CPU, 0),  # where engines run on a GPU
        )
        response = asked.exec()
        if response.has_error():
            raise TargetError(response.error().message())
        found: np.ndarray = pb.get_output_tensor_by_name(response, output).as_numpy()
        return found

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
        """The name of a class, else its number."""
        names = self._told["labels"]
        return names[place] if place < len(names) else str(place)
