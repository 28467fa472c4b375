"""The residual stream of a model, as its graph and as torch compute it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from rewrite import session

from trimtab.passes.graph import save_graph


def run(graph: gs.Graph, tensors: list[gs.Tensor], feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    """The values of `tensors`."""
    for tensor in tensors:
        tensor.dtype = np.float32
        if not any(tensor is output for output in graph.outputs):
            graph.outputs.append(tensor)
    save_graph(graph, folder / "model.onnx")
    runner = session(folder / "model.onnx")
    known = {i.name for i in runner.get_inputs()}
    return runner.run([t.name for t in tensors], {name: value for name, value in feeds.items() if name in known})


def streams(
    model: Any, feeds: dict[str, np.ndarray], before: str | None = None, behind: str | None = None
) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
    """(x, middle, y) of each layer, as the torch model computes them.

    Args:
        before, behind: module of a layer whose input, or output, is the stream between attention and FFN.
    """
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    layers = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    found: list[dict[str, torch.Tensor]] = [{} for _ in layers]
    hooks = []

    def first(value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value

    for layer, kept in zip(layers, found, strict=True):

        def whole(_: Any, args: Any, kwargs: Any, out: Any, kept: dict[str, torch.Tensor] = kept) -> None:
            kept["x"] = args[0] if args else kwargs["hidden_states"]
            kept["y"] = first(out)

        def inside(module: Any, args: Any, out: Any, kept: dict[str, torch.Tensor] = kept) -> None:
            kept["middle"] = first(args) if before else first(out)

        hooks.append(layer.register_forward_hook(whole, with_kwargs=True))
        place = before or behind
        if place:
            hooks.append(layer.get_submodule(place).register_forward_hook(inside))
    with torch.no_grad():
        model(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    for hook in hooks:
        hook.remove()
    return [(kept["x"], kept.get("middle"), kept["y"]) for kept in found]
