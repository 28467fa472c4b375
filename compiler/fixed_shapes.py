"""Models that were exported with a fixed batch size or a fixed length of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.errors import InputError

if TYPE_CHECKING:
    from trimtab.compiler.feeds import Run


def fixed_batch(inputs: Sequence[gs.Tensor]) -> int | None:
    """The fixed batch size of a model; None if its batch is dynamic."""
    return next((_fixed(tensor, 0) for tensor in inputs), None)


def fixed_tokens(inputs: Sequence[gs.Tensor]) -> int | None:
    """The fixed length of texts of a model; None if the length is dynamic."""
    return next((_fixed(tensor, 1) for tensor in inputs if tensor.name == "input_ids"), None)


def in_whole_batches(run: Run, inputs: Sequence[gs.Tensor]) -> Run:
    """Wrap `run` of a model with a fixed batch, so that it takes fewer samples, and refuses more.

    Samples are repeated to fill the batch, and the outputs of the repetitions are cut off. The first axis of an output
    is the samples, or samples · rows of each sample.
    """
    size = fixed_batch(inputs)
    if size is None:
        return run

    def filled(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        rows = len(next(iter(feeds.values())))
        if rows == size:
            return run(feeds)
        if rows > size:
            raise InputError(f"the model takes {size} samples at once, and the feeds have {rows}", hint="divide them")
        outputs = run({name: np.resize(value, (size, *value.shape[1:])) for name, value in feeds.items()})
        return {name: value[: len(value) * rows // size] if value.ndim else value for name, value in outputs.items()}

    return filled


def _fixed(tensor: gs.Tensor, axis: int) -> int | None:
    size = tensor.shape[axis] if tensor.shape is not None and len(tensor.shape) > axis else None
    return size if isinstance(size, int) and size > 0 else None
