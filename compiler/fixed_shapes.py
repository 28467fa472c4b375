"""Models that were exported for one batch and one length of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from trimtab.compiler.feeds import Run


def fixed_batch(inputs: Sequence[gs.Tensor]) -> int | None:
    """The one batch that a model takes; None if it takes any."""
    return next((_fixed(tensor, 0) for tensor in inputs), None)


def fixed_tokens(inputs: Sequence[gs.Tensor]) -> int | None:
    """The one length of texts that a model takes; None if it takes any."""
    return next((_fixed(tensor, 1) for tensor in inputs if tensor.name == "input_ids"), None)


def in_whole_batches(run: Run, inputs: Sequence[gs.Tensor]) -> Run:
    """`run`, which may be given fewer samples than the one batch that it takes: some are repeated, and their outputs
    are cut off. Samples are the first axis of outputs, alone or with what each sample has.
    """
    size = fixed_batch(inputs)
    if size is None:
        return run

    def filled(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        rows = len(next(iter(feeds.values())))
        if rows == size:
            return run(feeds)
        outputs = run({name: np.resize(value, (size, *value.shape[1:])) for name, value in feeds.items()})
        return {name: value[: len(value) * rows // size] if value.ndim else value for name, value in outputs.items()}

    return filled


def _fixed(tensor: gs.Tensor, axis: int) -> int | None:
    size = tensor.shape[axis] if tensor.shape is not None and len(tensor.shape) > axis else None
    return size if isinstance(size, int) and size > 0 else None
