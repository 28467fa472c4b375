"""Puts the neurons of each FFN in the order of their groups."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.compiler.progress import Progress
from trimtab.passes.ffn_route.grouping import group_neurons
from trimtab.training.huggingface import is_first_process
from trimtab.training.linears import FFNModules, permute_neurons, rows
from trimtab.training.lte.record import batches_of, real_tokens, to_device
from trimtab.training.lte.routed import Routed
from trimtab.training.resume import Unfinished
from trimtab.training.texts import Examples

_TOKENS = 2048  # tokens in the comparison of which neurons are needed together


def group(
    routed: Routed, ffns: Sequence[FFNModules], examples: Examples, run: Unfinished, progress: Progress | None
) -> None:
    """Put the neurons of each FFN in group order, in place. The orders are saved for a resumed run."""
    settings = routed.settings
    run.keep(grouped=True)
    if settings.group == 1:
        return  # any order will do
    places = {ffn.layer: run.folder / f"order.{ffn.layer}.npy" for ffn in ffns}
    saved = {layer for layer, place in places.items() if place.is_file()}
    needed = needed_neurons(routed, ffns, examples) if settings.group_by == "need" and len(saved) < len(ffns) else {}
    for number, ffn in enumerate(ffns):
        place = places[ffn.layer]
        if ffn.layer in saved:
            order = np.load(place)
        else:
            features = needed[ffn.layer].T - 0.5 if needed else (ffn.gate or ffn.up).weight.T.float().numpy(force=True)
            order = group_neurons(features, settings.group, seed=settings.seed)
            if is_first_process():
                part = place.with_suffix(".part.npy")
                np.save(part, order)
                part.replace(place)
        permute_neurons(ffn, order)
        if progress is not None and is_first_process():
            progress("group neurons", number + 1, len(ffns))


def needed_neurons(routed: Routed, ffns: Sequence[FFNModules], examples: Examples) -> dict[int, np.ndarray]:
    """Which neurons a token needs: those that add most to the dense FFN's output, |h| · ‖row of W_down‖.

    Their number is the share that the sparsity leaves.

    Returns:
        number of the FFN → bool [tokens, d_ff], for some training tokens.
    """
    parts: dict[int, list[np.ndarray]] = {ffn.layer: [] for ffn in ffns}
    hooks, was, real = [], routed.training, torch.zeros(0, dtype=torch.bool)

    def keep(ffn: FFNModules, count: int, norms: Tensor, down: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        added = (inputs[0].detach().float().abs() * norms).flatten(0, -2)
        added = added[real.to(added.device)] if len(real) == len(added) else added
        least = added.kthvalue(added.shape[-1] - count + 1, dim=-1, keepdim=True).values
        parts[ffn.layer].append((added >= least).numpy(force=True))

    for ffn in ffns:
        count = max(1, round((1 - routed.settings.sparsity) * ffn.d_ff))
        hooks.append(ffn.down.register_forward_pre_hook(partial(keep, ffn, count, rows(ffn.down).norm(dim=1).float())))
    routed.eval()
    try:
        for batch in batches_of(examples, _TOKENS, routed.settings.batch_size):
            real = real_tokens(batch)
            with torch.no_grad():
                routed.run(to_device(batch, routed), "dense")
    finally:
        routed.train(was)
        for hook in hooks:
            hook.remove()
    return {layer: np.concatenate(each) for layer, each in parts.items()}
