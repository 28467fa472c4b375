"""Sessions of ONNX Runtime as segments. A Triton repository carries this module for generation."""

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
    """A session that runs a whole model: arrays in, arrays out.

    Args:
        session: the session; any number of threads may run it.
        name: name of the model in error messages.
        cache: layout of a decoder's cache; None where no generation is needed.
        device: device of the float outputs of a `BoundSession`, such as "cpu" or "cuda:1".
        options: options of each run, by which another thread may end it.
    """

    def __init__(
        self, session: ort.InferenceSession, *, name: str = "the model", cache: Cache | None = None,
        device: str = "cpu", options: ort.RunOptions | None = None,
    ) -> None:  # fmt: skip
        self.session, self.name, self.cache, self.device, self.options = session, name, cache, device, options
        self.inputs = tuple(tensor.name for tensor in session.get_inputs())
        self.outputs = tuple(tensor.name for tensor in session.get_outputs())

    def run(self, feeds: Values) -> Values:
        with running(self.name):
            outputs = self.session.run(None, feeds, self.options)
        return dict(zip(self.outputs, outputs, strict=True))

    def host(self, value: Any) -> np.ndarray:
        array: np.ndarray = value if isinstance(value, np.ndarray) else value.numpy()
        return array

    def generation(self, batch: int, length: int) -> tuple[Segment, Values]:
        tensors = {tensor.name: tensor for tensor in self.session.get_inputs()}
        caches = {name: self._initial_value(tensors[name], batch, length) for name in pasts(self.inputs)}
        in_place = self.cache is not None and self.cache.in_place
        return BoundSession(self, self.session.io_binding(), caches if in_place else {}), {} if in_place else caches

    def _initial_value(self, tensor: ort.NodeArg, batch: int, length: int) -> ort.OrtValue:
        """The initial value of the cache's input `tensor`."""
        if self.cache is None:
            raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")
        shape = self.cache.initial_shape(tensor.shape, batch, length)
        if shape is None or tensor.type not in _TYPES:
            raise TargetError(
                f"input {tensor.name!r} is {tensor.type} {tensor.shape}: not [batch, heads, past, width] of floats"
            )
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[tensor.type]))


class BoundSession(SessionSegment):
    """A session whose outputs stay on their device and are passed on without a copy.

    Args:
        whole: the session.
        binding: binding of a generation, used by one thread at a time; None creates one for each run.
        cache: past input → its memory, where an op updates the cache in place; past and present are bound to it once.
    """

    def __init__(
        self, whole: SessionSegment, binding: ort.IOBinding | None = None, cache: dict[str, ort.OrtValue] | None = None
    ) -> None:
        super().__init__(whole.session, name=whole.name, cache=whole.cache, device=whole.device)
        self._binding, self._caches = binding, cache or {}  # older versions bind memory without a reference to it
        for past, value in self._caches.items():
            assert binding is not None
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present_of(past), value)
        self.inputs = tuple(name for name in self.inputs if name not in self._caches)
        bound = [present_of(past) for past in self._caches]
        self._devices: dict[str, tuple[Any, ...]] = {
            # Shapes and masks are computed on the CPU.
            output.name: tuple(self.device.split(":")) if self.device != "cpu" and output.type in _TYPES else ("cpu",)
            for output in self.session.get_outputs()
            if output.name not in bound
        }
        self.outputs = (*bound, *self._devices)  # the order of the binding, in which the runtime lists them

    def run(self, feeds: Values) -> Values:
        binding = self._binding or self.session.io_binding()
        arrays = []  # kept alive until the run: they are bound without a copy
        with running(self.name):
            for name, value in feeds.items():
                if isinstance(value, np.ndarray):
                    arrays.append(value if value.flags.c_contiguous else np.ascontiguousarray(value))
                    binding.bind_cpu_input(name, arrays[-1])
                else:
                    binding.bind_ortvalue_input(name, value)
            for name, place in self._devices.items():  # bound again, or the runtime keeps the shapes of the last run
                binding.bind_output(name, *place)
            self.session.run_with_iobinding(binding)
        return dict(zip(self.outputs, binding.get_outputs(), strict=True))
