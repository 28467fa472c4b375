"""Sessions of ONNX Runtime as segments. A Triton repository carries this module to generate."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from trimtab.compiler.decoder_cache import Cache, pasts, present_of
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.passes.errors import TargetError
from trimtab.passes.ort_errors import running

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class SessionSegment(Segment):
    """A session that is all of a model: arrays in, arrays out.

    Args:
        session: which any number of threads may run.
        name: what errors call it.
        cache: of a decoder's file; None where generations are not wanted.
        device: where a `BoundSession` leaves floats, such as "cpu" or "cuda:1".
    """

    def __init__(
        self, session: ort.InferenceSession, *, name: str = "the model", cache: Cache | None = None, device: str = "cpu"
    ) -> None:
        self.session, self.name, self.cache, self.device = session, name, cache, device
        self.inputs = tuple(tensor.name for tensor in session.get_inputs())
        self.outputs = tuple(tensor.name for tensor in session.get_outputs())

    def run(self, feeds: Values) -> Values:
        with running(self.name):
            outputs = self.session.run(None, feeds)
        return dict(zip(self.outputs, outputs, strict=True))

    def host(self, value: Any) -> np.ndarray:
        array: np.ndarray = value if isinstance(value, np.ndarray) else value.numpy()
        return array

    def generation(self, batch: int, length: int) -> tuple[Segment, Values]:
        tensors = {tensor.name: tensor for tensor in self.session.get_inputs()}
        rooms = {name: self._room(tensors[name], batch, length) for name in pasts(self.inputs)}
        stays = self.cache is not None and self.cache.in_place
        return BoundSession(self, self.session.io_binding(), rooms if stays else {}), {} if stays else rooms

    def _room(self, tensor: ort.NodeArg, batch: int, length: int) -> ort.OrtValue:
        """What the input `tensor` of the cache starts with."""
        if self.cache is None:
            raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")
        shape = self.cache.room(tensor.shape, batch, length)
        if shape is None or tensor.type not in _TYPES:
            raise TargetError(
                f"input {tensor.name!r} is {tensor.type} {tensor.shape}: not [batch, heads, past, width] of floats"
            )
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[tensor.type]))


class BoundSession(SessionSegment):
    """A session whose outputs stay where it puts them, and are handed on without a copy.

    Args:
        whole: the session as it is.
        binding: of a generation, which one thread at a time uses; None makes one for each run.
        cache: past inputs that an op appends to in place, and their memory; past and present are bound to it once.
    """

    def __init__(
        self, whole: SessionSegment, binding: ort.IOBinding | None = None, cache: dict[str, ort.OrtValue] | None = None
    ) -> None:
        super().__init__(whole.session, name=whole.name, cache=whole.cache, device=whole.device)
        self._binding, self._rooms = binding, cache or {}  # older versions bind memory without holding it
        for past, value in self._rooms.items():
            assert binding is not None
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present_of(past), value)
        self.inputs = tuple(name for name in self.inputs if name not in self._rooms)
        bound = [present_of(past) for past in self._rooms]
        self._places: dict[str, tuple[Any, ...]] = {
            # Shapes and masks are computed on the CPU.
            output.name: tuple(self.device.split(":")) if self.device != "cpu" and output.type in _TYPES else ("cpu",)
            for output in self.session.get_outputs()
            if output.name not in bound
        }
        self.outputs = (*bound, *self._places)  # the order in which the runtime lists them: that of the binding

    def run(self, feeds: Values) -> Values:
        binding = self._binding or self.session.io_binding()
        held = []  # until the run: arrays are bound where they lie
        with running(self.name):
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    held.append(value if value.flags.c_contiguous else np.ascontiguousarray(value))
                    binding.bind_cpu_input(name, held[-1])
                else:
                    binding.bind_ortvalue_input(name, value)
            for name, place in self._places.items():  # anew, or the runtime keeps to the shapes of the last run
                binding.bind_output(name, *place)
            self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))
