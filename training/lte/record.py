"""Records the inputs of a model's FFNs on texts, and how much the model's answers depend on FFN outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from trimtab.passes.errors import DataError
from trimtab.training.examples import Kind
from trimtab.training.linears import FFNModules
from trimtab.training.lte.routed import Routed
from trimtab.training.lte.router import LinearRouter
from trimtab.training.texts import Examples

_WEIGHTS = "weights.safetensors"
_FEWEST = 64  # minimum number of tokens that a router can learn from


class Recorded(NamedTuple):
    """Recorded inputs of one FFN.

    Attributes:
        x: inputs, [n, d_model], float32.
        weights: mean square of the gradients of the model's answers by each token's FFN output, [n], float32. The
            answers of a classifier depend on few tokens of its last layers. In a language model each token is an
            answer, and all tokens have the mean weight. All weights are 1 if no gradients are recorded.
    """

    x: np.ndarray
    weights: np.ndarray


def batches_of(examples: Examples, tokens: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the first training samples with about `tokens` tokens; the same at each call."""
    if examples.lengths is None:
        samples = math.ceil(tokens / len(examples.train[0]))
    else:
        samples = int(np.searchsorted(examples.lengths.cumsum(), tokens)) + 1
    return examples.some(samples, batch_size)


def real_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Which tokens of a batch are not padding, bool, [batch * tokens]."""
    mask = batch.get("attention_mask")
    return (torch.ones_like(batch["input_ids"]) if mask is None else mask).reshape(-1) != 0


def to_device(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch on the device of `model`."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def record_inputs(
    routed: Routed, ffns: Sequence[FFNModules], examples: Examples, tokens: int, folder: Path | None = None, *,
    weighed: bool = False,
) -> dict[int, Recorded]:  # fmt: skip
    """Record the inputs of each FFN of the dense model: number of the FFN → at most `tokens` rows.

    Args:
        folder: folder of files that store the inputs, read in parts; an earlier recording there is reused.
        weighed: also record the tokens' weights; else all weights are 1.

    Raises:
        DataError: the texts have too few tokens.
    """
    done = None if folder is None else folder / "recorded"
    if done is not None and done.is_file():
        assert folder is not None
        return {ffn.layer: _read(folder, ffn) for ffn in ffns}
    batches = batches_of(examples, tokens, routed.settings.batch_size)
    count = min(tokens, sum(int(real_tokens(batch).sum()) for batch in batches))
    if count < _FEWEST:
        raise DataError(f"the texts have {count} tokens: too few for routers to learn from", hint="give more texts")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(routed.settings.seed)
    arrays = {ffn.layer: _array(folder, ffn, count) for ffn in ffns}
    weights = {ffn.layer: np.ones(count, np.float32) for ffn in ffns}
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    hooks = [ffn.up.module.register_forward_pre_hook(partial(_keep_input, inputs, ffn.layer)) for ffn in ffns]
    if weighed:
        hooks += [ffn.down.register_forward_hook(partial(_keep_output, outputs, ffn.layer)) for ffn in ffns]
    training, start = routed.training, 0
    learning = [parameter for parameter in routed.parameters() if parameter.requires_grad]
    routed.eval().requires_grad_(False)  # slopes by outputs alone
    try:
        for batch in batches_of(examples, tokens, routed.settings.batch_size):
            real = real_tokens(batch)
            with torch.set_grad_enabled(weighed):
                logits = routed.run(to_device(batch, routed), "dense")
            end = min(count, start + int(real.sum()))

            def rows(of_tokens: Tensor, real: Tensor = real, count: int = end - start) -> np.ndarray:
                flat = of_tokens.flatten(0, -2).float().cpu()
                return (flat[real] if len(real) == len(flat) else flat)[:count].numpy()

            for layer, array in arrays.items():
                array[start:end] = rows(inputs[layer])
            if weighed:
                for layer, slopes in _slopes(logits, outputs, generator, routed.kind).items():
                    weights[layer][start:end] = np.square(rows(slopes)).mean(-1)
            start = end
    finally:
        routed.train(training)
        for parameter in learning:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    if routed.kind == "language model":
        weights = {layer: np.full_like(each, each.mean()) for layer, each in weights.items()}
    if done is not None:
        assert folder is not None
        save_file({str(layer): each for layer, each in weights.items()}, folder / _WEIGHTS)
        done.touch()
    return {layer: Recorded(x, weights[layer]) for layer, x in arrays.items()}


def _slopes(logits: Tensor, outputs: dict[int, Tensor], generator: torch.Generator, kind: Kind) -> dict[int, Tensor]:
    """Of the answers by each of `outputs`: of logits [batch, classes] in a random direction, or of the log-likelihood
    of tokens drawn from logits [batch, tokens, vocabulary], so that mean squares are the Fisher information."""
    if kind == "classifier":
        direction = torch.randn(logits.shape, generator=generator).to(logits)
        direction -= direction.mean(-1, keepdim=True)  # a shift of all logits is no other answer
    else:
        direction = -logits.detach().float().softmax(-1)
        level = torch.rand(*logits.shape[:-1], 1, generator=generator).to(logits.device)
        drawn = (-direction.cumsum(-1) < level).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
        direction.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=direction.dtype))
    slopes = torch.autograd.grad((logits * direction).sum(), list(outputs.values()))
    return dict(zip(outputs, slopes, strict=True))


def _keep_input(inputs: dict[int, Tensor], layer: int, up: nn.Module, given: tuple[Tensor, ...]) -> None:
    inputs[layer] = given[0].detach()


def _keep_output(outputs: dict[int, Tensor], layer: int, down: nn.Module, given: Any, output: Tensor) -> None:
    outputs[layer] = output if output.requires_grad else output.requires_grad_()


def _array(folder: Path | None, ffn: FFNModules, count: int) -> Any:
    shape = (count, ffn.d_model)
    if folder is None:
        return np.empty(shape, np.float32)
    return np.lib.format.open_memmap(folder / f"{ffn.layer}.npy", mode="w+", dtype=np.float32, shape=shape)


def _read(folder: Path, ffn: FFNModules) -> Recorded:
    x = np.load(folder / f"{ffn.layer}.npy", mmap_mode="r")
    return Recorded(x, load_file(folder / _WEIGHTS)[str(ffn.layer)])


def standardise(routed: Routed, recorded: dict[int, Recorded]) -> None:
    """Have each linear router take inputs of the mean and the deviation of those that were recorded."""
    for layer, (x, _) in recorded.items():
        router = routed.routing.router(layer)
        if not isinstance(router, LinearRouter):
            continue
        mean, deviation = (
            torch.from_numpy(each.astype(np.float32)).to(router.bias.device)
            for each in (x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64))
        )
        router.standardise(mean, deviation)
