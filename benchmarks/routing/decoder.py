"""A routed decoder on WikiText-2: perplexity over what is computed, beside baselines; a batch's union; and time."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sparse_ffn import copy_bound

from routing.counted import Counted, at_dials, union_growth
from routing.curves import CURVES
from routing.frontier import Dials, Judge, no_dials
from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.engine import Engine

TOKENS = 256  # of a block, as in training
BATCH = 4
CONTEXT, STEPS = 128, 32  # tokens in the cache when steps are timed, and steps that differ
UNION = (1, 2, 4, 8, 16)
GROUP = 8
"""Neurons of a group of fitted routers, at the least: linear ones of single neurons cost a third of an FFN."""
PART = 4
"""Each so-manieth block judges where a dial is moved; all do where it is not."""

SLOW = {"topk"}
"""Curves without a dial: a build of all weights for each point."""

ROUTE: dict[str, Any] = {"ffn-route": {"most": 1.0}}
INT8: dict[str, Any] = {"dynamic-int8": {"scales": "auto"}}
TIMED: dict[str, tuple[bool, list[Any]]] = {
    "dense": (False, []), "routed": (True, [ROUTE]),
    "dense, int8": (False, [INT8]), "routed, int8": (True, [{"ffn-route": {"most": 1.0, "weights": "int8"}}, INT8]),
}  # fmt: skip
"""Engine → whether it has routers, and its passes."""

Say = Callable[[str], None]


class Models(Judge):
    """The decoder before training, after dense training, and with routers; and the text that judges.

    Attributes:
        blocks: [n, TOKENS], evenly from the whole validation text, articles one behind the other.
    """

    score = "perplexity"

    def __init__(self, folder: Path, shared: Path, work: Path, blocks: int) -> None:
        self.work, self.base = work, open_source(folder / "model")
        self.equal_training = (folder / "dense").is_dir()
        self.dense_model = open_source(folder / "dense") if self.equal_training else self.base
        super().__init__(self.dense_model.onnx)
        self.routed = open_source(folder / "routed")
        self.record: dict[str, Any] = json.loads((folder / "routed" / "lte.json").read_text(encoding="utf-8"))
        assert self.base.tokenizer is not None
        tokenizer = load_tokenizer(self.base.tokenizer)
        end = [min(tokenizer.end_ids)] if tokenizer.end_ids else []
        stream = np.array([
            token
            for article in articles(shared / "data" / "wikitext2" / "valid.txt.gz")
            for token in [*tokenizer.encode([article])["input_ids"][0].tolist(), *end]
        ])  # fmt: skip
        whole = stream[: len(stream) // TOKENS * TOKENS].reshape(-1, TOKENS)
        self.blocks = whole[np.linspace(0, len(whole) - 1, min(blocks, len(whole))).astype(int)]
        self.train = work / "train.jsonl"
        texts = articles(shared / "data" / "wikitext2" / "train.txt.gz")
        self.train.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

    def build(self, passes: list[Any], *, routed: bool, out: str = "build") -> Build:
        recipe = {
            "passes": passes, "threads": 2, "check": False,
            "calibration": {"samples": 64, "max_tokens": TOKENS, "states": 8192},
            "workload": {"batch": [1, 1, 16], "tokens": [1, 1, TOKENS], "past": [0, CONTEXT, 2 * TOKENS]},
        }  # fmt: skip
        source, data = (self.routed, None) if routed else (self.dense_model, self.train)
        return compile_model(source, recipe, self.work / out, data=data)

    def dense(self) -> Counted:
        return Counted(self.dense_onnx, self.dense_onnx)

    def answer(self, counted: Counted, dials: Dials, *, part: bool) -> float:
        """Perplexity of all tokens of the blocks but the first of each; all tokens of a block are given at once."""
        total, many, blocks = 0.0, 0, self.blocks[::PART] if part else self.blocks
        counted.begin()
        for start in range(0, len(blocks), BATCH):
            ids = blocks[start : start + BATCH]
            logits = torch.from_numpy(counted.run(feeds_of(counted, ids) | dials(len(ids)), ids.size)["logits"][:, :-1])
            wanted = torch.from_numpy(ids[:, 1:]).reshape(-1)
            losses = torch.nn.functional.cross_entropy(logits.reshape(len(wanted), -1), wanted, reduction="none")
            total, many = total + float(losses.double().sum()), many + len(wanted)
        return float(np.exp(total / many))

    def beside(self, score: float, dense: float) -> float:
        """Times the dense perplexity."""
        return score / dense


def articles(path: Path) -> list[str]:
    """Of a file of WikiText: each begins with a heading of one `=`."""
    whole = gzip.decompress(path.read_bytes()).decode()
    return [text.strip() for text in re.split(r"\n(?= = [^=])", whole) if len(text.strip()) > 200]


def feeds_of(counted: Counted, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Whole blocks, with nothing in the cache."""
    past = {name: np.zeros((len(ids), heads, 0, width), np.float32) for name, heads, width in counted.caches}
    return past | {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def measure(
    folder: Path, shared: Path, work: Path, *, only: set[str], blocks: int, seconds: float, say: Say
) -> dict[str, Any]:
    """Frontier, union and times."""
    models = Models(folder, shared, work, blocks)
    asked = models.record["settings"]
    without_training = asked | {"group": max(asked["group"], GROUP)}
    found: dict[str, Any] = {
        "asked": asked["sparsity"], "equal_training": models.equal_training, "wanted": {"beside": 1.03},
        "training": {key: models.record.get(key) for key in ("steps", "settings", "sparsity", "reached")}, "curves": {},
    }  # fmt: skip
    curves = [curve for curve in CURVES if curve.name in only and curve.name not in SLOW]
    if curves:
        say("decoder: dense")
        value, _ = models.of_dense()
        found |= {"tokens": int(models.blocks[:, 1:].size), "blocks": len(models.blocks), "block": TOKENS,
                  "dense_perplexity": value, "base_perplexity": value}  # fmt: skip
        if models.equal_training:
            base = Counted(models.base.onnx, models.dense_onnx)
            found["base_perplexity"] = models.answer(base, no_dials, part=False)
    for curve in curves:
        say(f"decoder: {curve.name}")
        found["curves"][curve.name] = models.curve(curve, asked if curve.routed else without_training)
        if curve.routed and "union" not in found:
            found["union"] = union(models)
    if seconds:
        say("decoder: times")
        found["times"] = times(models, seconds)
    return found


def union(models: Models) -> dict[str, Any]:
    """Share of the groups that a batch reads, of tokens of different texts at the trained threshold."""
    build = models.build([ROUTE], routed=True)
    counted, ids = Counted(build.model, models.dense_onnx), models.blocks[:BATCH]
    outputs = counted.run(feeds_of(counted, ids) | at_dials(build.manifest, len(ids), {}), ids.size)
    groups = {choice.neurons // choice.block for choice in counted.choices}
    assert len(groups) == 1
    choices = [outputs[choice.blocks] for choice in counted.choices]
    return union_growth(choices, groups.pop(), UNION)


def times(models: Models, seconds: float) -> dict[str, Any]:
    """Milliseconds of a token at batch 1, behind `CONTEXT` others of the validation text."""
    steps: dict[str, Callable[[], object]] = {}
    for name, (routed, passes) in TIMED.items():
        out = name.replace(", ", "-")
        build = models.build(passes, routed=routed, out=out)
        steps[name] = stepper(load(build.path, verify=False), models.blocks[:1, : CONTEXT + STEPS])
    bandwidth = copy_bound(2)
    taken = interleave(steps, seconds=seconds, rest=REST_S)
    engines = {}
    for name, timing in taken.items():
        peer = taken["dense, int8" if "int8" in name else "dense"]
        engines[name] = {"ms": timing.median_ms, "ratio": peer.median_ms / timing.median_ms}
    return {"context": CONTEXT, "memory_gb_s": bandwidth, "engines": engines}


def stepper(engine: Engine, ids: np.ndarray) -> Callable[[], object]:
    """A call that decodes one of the last `STEPS` tokens of `ids` [batch, tokens], behind those before it."""
    steps, batch = engine.runner.steps(*ids.shape), len(ids)
    dials = at_dials(engine.manifest, batch, {})
    steps.run(ids, np.ones_like(ids), dials)
    each = cycle(range(ids.shape[1] - STEPS, ids.shape[1]))

    def step() -> object:
        at = next(each)
        return steps.run(ids[:, at : at + 1], np.ones((batch, at + 1), np.int64), dials)

    return step
