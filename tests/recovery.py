"""What tests of recovery share: tiny models, data for them, and a pass that harms them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import zoo

from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.contract import Pass, PassContext, PassResult
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.recover import Recover


class ZeroNeurons(Pass):
    """Silences the first neurons of each FFN, in place."""

    name: ClassVar[str] = "zero-neurons"
    summary: ClassVar[str] = "For tests."

    share: float = 0.5

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        ffns = find_anatomy(graph).ffns
        for ffn in ffns:
            w = np.array(ffn.down.w())
            w[: int(self.share * ffn.d_ff)] = 0
            ffn.down.weight.values = np.ascontiguousarray(w.T if ffn.down.transposed else w)
        return PassResult(self.name, len(ffns))


def recipe(*before: Pass, after: tuple[Pass, ...] = ()) -> Recipe:
    return Recipe(passes=(*before, Recover(), *after))


def onnx_source(family: str) -> Source:
    return Source(family, zoo.exported(family), None, None, zoo.TEXT, "onnx")


def empty_profile(source: Source) -> Profile:
    tensors: dict[str, Any] = {"head.states": np.full((1, 1), 7, np.float32)}  # a file needs a tensor
    return Profile(ProfileInfo(model=source.fingerprint, data="0" * 64, samples=1, tokens=7), tensors)


def arrays_of(family: str, count: int, folder: Path, tokens: int = 9) -> Dataset:
    """Data from which the models of `zoo` are known to learn in a few steps."""
    feeds = zoo.feeds(family, count, tokens, np.random.default_rng(0))
    inputs = {tensor.name for tensor in onnx_source(family).graph().inputs}
    np.savez(folder / "data.npz", **{name: value for name, value in feeds.items() if name in inputs})
    return read_data(folder / "data.npz")
