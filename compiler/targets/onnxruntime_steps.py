"""A decoder in ONNX Runtime, whose cache is bound once for all steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from trimtab.compiler.targets.base import Steps
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import load_graph

_PAST, _PRESENT = "past_key_values.", "present."
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxRuntimeSteps(Steps):
    """Steps of a session.

    Where attention is GroupQueryAttention, past and present are one buffer of the full length, which the op appends to.
    Another decoder makes a new present in each step, which becomes the next one's past.

    Args:
        cache: of the session's model.
    """

    def __init__(self, session: ort.InferenceSession, batch: int, length: int, cache: Cache) -> None:
        self._session, self._binding, self._in_place = session, session.io_binding(), cache.in_place
        self._past = {t.name: t for t in session.get_inputs() if t.name.startswith(_PAST)}
        if not self._past:
            raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")
        self._inputs = {t.name for t in session.get_inputs()}
        for name, tensor in self._past.items():
            _, heads, _, width = tensor.shape
            width = cache.head_dim if isinstance(width, str) else width
            if not isinstance(heads, int) or not isinstance(width, int) or tensor.type not in _TYPES:
                raise TargetError(
                    f"input {name!r} is {tensor.type} {tensor.shape}: not [batch, heads, past, width] of floats"
                )
            empty = np.zeros((batch, heads, length if cache.in_place else 0, width), _TYPES[tensor.type])
            value = ort.OrtValue.ortvalue_from_numpy(empty)
            self._binding.bind_ortvalue_input(name, value)
            if cache.in_place:
                self._binding.bind_ortvalue_output(_PRESENT + name.removeprefix(_PAST), value)

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        self._binding.bind_cpu_input("input_ids", input_ids)
        self._binding.bind_cpu_input("attention_mask", attention_mask)
        if "position_ids" in self._inputs:
            total, tokens = attention_mask.shape[1], input_ids.shape[1]
            before = attention_mask.sum(1) - attention_mask[:, total - tokens :].sum(1)
            self._binding.bind_cpu_input("position_ids", before[:, None] + np.arange(tokens))
        # Outputs of a shape that changes have to be bound anew, or the runtime keeps to the shape of the last step.
        changing = ["logits"] if self._in_place else ["logits", *(_PRESENT + n.removeprefix(_PAST) for n in self._past)]
        for name in changing:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        found = dict(zip(self._binding_names(changing), self._binding.get_outputs(), strict=True))
        if not self._in_place:
            for name in self._past:
                self._binding.bind_ortvalue_input(name, found[_PRESENT + name.removeprefix(_PAST)])
        logits: np.ndarray = found["logits"].numpy()
        return logits

    def _binding_names(self, changing: list[str]) -> list[str]:
        """Names of the bound outputs, in the order in which the runtime lists them: that of their first binding."""
        fixed = [_PRESENT + name.removeprefix(_PAST) for name in self._past] if self._in_place else []
        return [*fixed, *changing]


@dataclass(frozen=True)
class Cache:
    """What a decoder's file tells of its cache beyond its inputs.

    Attributes:
        in_place: every part of it goes into an op that can append to it where it lies.
        head_dim: width of keys and values, of which some exporters leave but a symbol in the inputs.
    """

    in_place: bool
    head_dim: int | None

    @classmethod
    def of(cls, model: Path) -> Cache:
        """Read an ONNX file, without its weights."""
        graph = load_graph(model)
        readers = {node.op for tensor in graph.inputs if tensor.name.startswith(_PAST) for node in tensor.outputs}
        widths = {attention.head_dim for attention in find_anatomy(graph).attentions}
        return cls(readers == {"GroupQueryAttention"}, widths.pop() if len(widths) == 1 else None)
