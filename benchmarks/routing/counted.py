"""A model that answers and tells what its FFNs computed for that: neurons, and multiply-adds beside its dense self."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from trimtab.compiler.checks.cost import Counter
from trimtab.compiler.decoder_cache import PAST
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.graph import load_graph, save_graph

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Choice:
    """Where an FFN's choice is told: `blocks` is an output of the graph, [tokens, k], numbers of blocks or -1."""

    blocks: str
    block: int
    neurons: int


@dataclass
class Totals:
    """What was computed: tokens through FFNs, FLOPs, and neurons left out of all FFNs together."""

    tokens: int = 0
    flops: int = 0
    left_out: int = 0


class Counted:
    """Runs a compiled model, and adds up what it computes.

    Args:
        model: the ONNX file.
        dense: of the dense model, whose FFNs are all of it that differs.
        threads: of a run.

    Attributes:
        totals: what was computed since `begin`.
        choices: of the FFNs that leave neurons out, in order.
        inputs: names of the model's inputs, dials among them.
        caches: of a decoder, (name, heads, width) of the inputs that hold its cache.
    """

    def __init__(self, model: Path, dense: Path, threads: int = 2) -> None:
        ffns = find_anatomy(load_graph(dense)).ffns
        self._params, self._neurons = sum(ffn.params for ffn in ffns), sum(ffn.d_ff for ffn in ffns)
        graph = load_graph(model)
        self.choices: list[Choice] = []
        for node in graph.nodes:
            if node.op == "SparseDown":
                _, blocks, down = node.inputs[:3]
                self.choices.append(Choice(blocks.name, int(node.attrs["block"]), int(down.shape[0])))
                if all(blocks is not output for output in graph.outputs):
                    graph.outputs.append(blocks)
        self.caches = [(x.name, int(x.shape[1]), int(x.shape[3])) for x in graph.inputs if x.name.startswith(PAST)]
        self._folder = TemporaryDirectory(prefix="trimtab-counted-")
        path = Path(self._folder.name) / "choices.onnx"
        save_graph(graph, path)
        self._counter = Counter(path, threads)
        path.with_name(path.name + ".data").unlink(missing_ok=True)
        self.inputs = self._counter.inputs
        self.begin()

    def begin(self) -> None:
        """Count from 0 again."""
        self.totals = Totals()

    def run(self, feeds: Feeds, tokens: int) -> dict[str, np.ndarray]:
        """The model's outputs, and the choices.

        Args:
            feeds: may hold more than the model takes; dials among them.
            tokens: how many of the feeds go through FFNs.
        """
        cost, outputs = self._counter.run({name: feeds[name] for name in self.inputs if name in feeds})
        self.totals.flops += cost.flops
        self.totals.tokens += tokens
        for choice in self.choices:
            blocks = outputs[choice.blocks]
            assert len(blocks) == tokens, "all tokens share one choice"
            self.totals.left_out += tokens * choice.neurons - choice.block * int((blocks >= 0).sum())
        return outputs

    def spent(self, dense: Totals, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Shares of the same texts' dense cost, since `begin`.

        Args:
            rows: of the pass's report, one for each FFN that it rewrote.

        Returns:
            neurons: of the FFNs' neurons those computed; ffn: of the FFNs' multiply-adds, what chooses neurons
            included; bytes: of their bytes in fp32, which one token reads; flops: of those of the whole model.
        """
        mine = self.totals
        assert mine.tokens == dense.tokens
        ffn = 1 - (dense.flops - mine.flops) / (2 * self._params * mine.tokens)
        # each weight is read for one multiply-add, those of routers that are copies for less than four bytes
        spared = sum(row.get("router_macs", 0) - row.get("router_bytes", 0) / 4 for row in rows)
        return {
            "tokens": mine.tokens, "neurons": 1 - mine.left_out / (mine.tokens * self._neurons), "ffn": ffn,
            "bytes": ffn - spared / self._params, "flops": mine.flops / dense.flops,
        }  # fmt: skip


def union_growth(choices: Sequence[np.ndarray], groups: int, sizes: Sequence[int], seed: int = 0) -> dict[str, float]:
    """Share of the groups that any of `size` tokens computes, by size: what a batch reads of the weights.

    Args:
        choices: of each FFN, numbers of the groups of each token, -1 for none, [tokens, k].
        groups: of an FFN.
        sizes: tokens of a batch, drawn at random among all.
    """
    rng, found = np.random.default_rng(seed), dict[str, float]()
    masks = [_mask(blocks, groups) for blocks in choices]
    tokens = len(masks[0])
    for size in sizes:
        drawn = np.stack([rng.choice(tokens, size, replace=False) for _ in range(min(200, tokens))])
        found[str(size)] = float(np.mean([mask[drawn].any(1).mean() for mask in masks]))
    return found


def _mask(blocks: np.ndarray, groups: int) -> np.ndarray:
    """bool [tokens, groups] of numbers [tokens, k]."""
    mask = np.zeros((len(blocks), groups + 1), bool)
    np.put_along_axis(mask, blocks.astype(np.int64) % (groups + 1), True, axis=1)  # -1 is the last column
    return mask[:, :groups]


def at_dials(manifest: Any, batch: int, dials: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Dials as inputs of a call of `batch` samples."""
    turned: dict[str, np.ndarray] = manifest.all_dials.feeds(batch, dials)
    return turned
