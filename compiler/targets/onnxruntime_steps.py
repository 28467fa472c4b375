"""A decoder in ONNX Runtime, whose cache is bound once for all steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from trimtab.compiler.targets.base import Steps
from trimtab.passes.errors import TargetError

PAST, PRESENT = "past_key_values.", "present."
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
        self._past = {t.name: t for t in session.get_inputs() if t.name.startswith(PAST)}
        if not self._past:
            raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")
        self._inputs = {t.name for t in session.get_inputs()}
        self._rooms: list[ort.OrtValue] = []  # older versions of ONNX Runtime bind memory without holding it
        for name, tensor in self._past.items():
            value = cache.empty(tensor, batch, length)
            self._rooms.append(value)
            self._binding.bind_ortvalue_input(name, value)
            if cache.in_place:
                self._binding.bind_ortvalue_output(PRESENT + name.removeprefix(PAST), value)

    def run(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        for name, value in step_feeds(input_ids, attention_mask, self._inputs).items():
            self._binding.bind_cpu_input(name, value)
        # Outputs of a shape that changes have to be bound anew, or the runtime keeps to the shape of the last step.
        changing = ["logits"] if self._in_place else ["logits", *(PRESENT + n.removeprefix(PAST) for n in self._past)]
        for name in changing:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        found = dict(zip(self._binding_names(changing), self._binding.get_outputs(), strict=True))
        if not self._in_place:
            for name in self._past:
                self._binding.bind_ortvalue_input(name, found[PRESENT + name.removeprefix(PAST)])
        logits: np.ndarray = found["logits"].numpy()
        return logits

    def _binding_names(self, changing: list[str]) -> list[str]:
        """Names of the bound outputs, in the order in which the runtime lists them: that of their first binding."""
        fixed = [PRESENT + name.removeprefix(PAST) for name in self._past] if self._in_place else []
        return [*fixed, *changing]


def step_feeds(input_ids: np.ndarray, attention_mask: np.ndarray, names: Collection[str]) -> dict[str, np.ndarray]:
    """Inputs of a step besides the cache, as far as a decoder with the inputs `names` takes them."""
    total, tokens = attention_mask.shape[1], input_ids.shape[1]
    before = attention_mask.sum(1) - attention_mask[:, total - tokens :].sum(1)
    feeds = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": before[:, None] + np.arange(tokens),
    }  # fmt: skip
    return {name: value for name, value in feeds.items() if name in names}


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
        import onnx  # here, because a Triton repository carries this module alone

        graph = onnx.load(str(model), load_external_data=False).graph
        past = {value.name: value.type.tensor_type.shape.dim for value in graph.input if value.name.startswith(PAST)}
        readers = {node.op_type for node in graph.node if not past.keys().isdisjoint(node.input)}
        sizes = {dims[-1].dim_value for dims in past.values() if dims}
        widths = sizes if 0 not in sizes else _head_dims(model)
        return cls(readers == {"GroupQueryAttention"}, widths.pop() if len(widths) == 1 else None)

    def empty(self, tensor: ort.NodeArg, batch: int, length: int) -> ort.OrtValue:
        """What the input `tensor` starts with: room for `length` tokens where it is filled in place, else for none.

        Raises:
            TargetError: it is no cache.
        """
        _, heads, _, width = tensor.shape
        width = self.head_dim if isinstance(width, str) else width
        if not isinstance(heads, int) or not isinstance(width, int) or tensor.type not in _TYPES:
            raise TargetError(
                f"input {tensor.name!r} is {tensor.type} {tensor.shape}: not [batch, heads, past, width] of floats"
            )
        room = np.zeros((batch, heads, length if self.in_place else 0, width), _TYPES[tensor.type])
        return ort.OrtValue.ortvalue_from_numpy(room)


def _head_dims(model: Path) -> set[int]:
    """Widths of the heads, where the inputs leave but a symbol for them: from the products of attention."""
    from trimtab.passes.anatomy import find_anatomy
    from trimtab.passes.graph import load_graph

    heads = (attention.head_dim for attention in find_anatomy(load_graph(model)).attentions)
    return {width for width in heads if width is not None}
