"""What the FFNs of a model read, recorded on texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.passes.errors import DataError
from trimtab.training.linears import FFNModules
from trimtab.training.lte.routed import Routed
from trimtab.training.texts import Examples

_FEWEST = 64  # tokens, from which no router can learn


def batches_of(examples: Examples, tokens: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the first samples to learn from, which have about so many tokens; the same at each call."""
    if examples.lengths is None:
        samples = math.ceil(tokens / len(examples.train[0]))
    else:
        samples = int(np.searchsorted(examples.lengths.cumsum(), tokens)) + 1
    return examples.some(samples, batch_size)


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Which tokens of a batch are no padding, bool, [batch * tokens]."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).reshape(-1) != 0


def to_device(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch where `model` is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def record_inputs(
    routed: Routed, ffns: Sequence[FFNModules], examples: Examples, tokens: int, folder: Path | None = None
) -> dict[int, np.ndarray]:
    """Inputs of each FFN of the dense model: number of the FFN → [n, d_model], float32, n at most `tokens`.

    Args:
        folder: keeps them in files, from where parts are read that are used; an earlier recording there is taken.

    Raises:
        DataError: far too few tokens.
    """
    done = None if folder is None else folder / "recorded"
    if done is not None and done.is_file():
        assert folder is not None
        return {ffn.layer: np.load(folder / f"{ffn.layer}.npy", mmap_mode="r") for ffn in ffns}
    batches = batches_of(examples, tokens, routed.settings.batch_size)
    count = min(tokens, sum(int(real_tokens(batch).sum()) for batch in batches))
    if count < _FEWEST:
        raise DataError(f"the texts have {count} tokens: too few for routers to learn from", hint="give more texts")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    arrays = {ffn.layer: _array(folder, ffn, count) for ffn in ffns}
    seen: dict[int, Tensor] = {}
    hooks = [ffn.up.module.register_forward_pre_hook(partial(_keep, seen, ffn.layer)) for ffn in ffns]
    training, start = routed.training, 0
    routed.eval()
    try:
        for batch in batches_of(examples, tokens, routed.settings.batch_size):
            real = real_tokens(batch)
            with torch.no_grad():
                routed.run(to_device(batch, routed), "dense")
            end = min(count, start + int(real.sum()))
            for layer, array in arrays.items():
                x = seen[layer].reshape(-1, array.shape[1]).float().cpu()
                array[start:end] = (x[real] if len(real) == len(x) else x)[: end - start].numpy()
            start = end
    finally:
        routed.train(training)
        for hook in hooks:
            hook.remove()
    if done is not None:
        done.touch()
    return arrays


def _keep(seen: dict[int, Tensor], layer: int, up: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen[layer] = inputs[0].detach()


def _array(folder: Path | None, ffn: FFNModules, count: int) -> Any:
    shape = (count, ffn.d_model)
    if folder is None:
        return np.empty(shape, np.float32)
    return np.lib.format.open_memmap(folder / f"{ffn.layer}.npy", mode="w+", dtype=np.float32, shape=shape)


def standardise(routed: Routed, inputs: dict[int, np.ndarray]) -> None:
    """Have each router take inputs of the mean and the deviation of those that were recorded."""
    for layer, x in inputs.items():
        router: Any = routed.routing.routers[str(layer)]
        mean, deviation = (
            torch.from_numpy(each.astype(np.float32)).to(router.mean.device)
            for each in (x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64))
        )
        router.standardise(mean, deviation)
