"""Routed FFNs of a fine-tuned encoder: accuracy over what is computed, beside baselines without training; time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from routing.counted import Counted, at_dials
from routing.curves import CURVES
from routing.frontier import Dials, Judge, no_dials
from routing.parts import ffn_part, open_part, record, turns
from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.peers import DENSE, INT8, open_peer
from trimtab.compiler.checks.peers.ort import quantized
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.data import batches, read_data
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.sources import Source

TOKENS = {"sst2": 64, "agnews": 96}
TIMED_TOKENS = 48
TEXTS_TIMED = 16
PART = 32
"""Batches of 32 texts that judge where a dial is moved; all do where it is not."""

INT8_PASS: dict[str, Any] = {"dynamic-int8": {"scales": "auto"}}
ROUTED: dict[str, list[Any]] = {
    "routed": [{"ffn-route": {"most": 1.0}}],
    "routed, dense where faster": ["ffn-route"],
    "routed, int8": [{"ffn-route": {"most": 1.0, "weights": "int8"}}, INT8_PASS],
}
Say = Callable[[str], None]


class Task(Judge):
    """A task's data and models.

    Attributes:
        checkpoint: the model before any training of this benchmark; dense: of equal training, else the checkpoint.
        routed: the model that `trimtab train --method lte` made.
        test: all batches of the test set, with labels.
    """

    score = "accuracy"

    def __init__(self, name: str, shared: Path, trained: Path, work: Path, texts: int | None) -> None:
        self.name, self.limit, self.work = name, TOKENS[name], work
        self.train, self.data = (shared / "data" / name / f"{part}.jsonl.gz" for part in ("train", "test"))
        self.checkpoint = open_source(shared / "models" / name)
        equal = trained / f"{name}-dense"
        self.dense_model = open_source(equal) if equal.is_dir() else self.checkpoint
        self.equal_training = equal.is_dir()
        super().__init__(self.dense_model.onnx)
        self.routed = open_source(trained / name)
        self.record: dict[str, Any] = json.loads((trained / name / "lte.json").read_text(encoding="utf-8"))
        dataset = read_data(self.data)
        count = min(texts or dataset.count, dataset.count)
        labels, start = np.array([label for _, label in dataset.sample(count, 0)]), 0
        self.test: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        for feeds in batches(dataset, self.dense_model, 32, self.limit, count, inputs=self.dense_model.graph().inputs):
            rows = len(feeds["input_ids"])
            self.test.append((feeds, labels[start : start + rows]))
            start += rows

    def build(self, passes: list[Any], *, routed: bool) -> Build:
        return self.compiled(self.routed if routed else self.dense_model, ["unpad", *passes], "build")

    def compiled(self, source: Source, passes: list[Any], out: str) -> Build:
        recipe = {
            "passes": passes, "threads": 2, "check": False,
            "workload": {"batch": [1, 1, 32], "tokens": [1, TIMED_TOKENS, self.limit]},
        }  # fmt: skip
        return compile_model(source, recipe, self.work / out, data=None if source is self.routed else self.train)

    def dense(self) -> Counted:
        return Counted(self.compiled(self.dense_model, ["unpad"], "dense").model, self.dense_onnx)

    def answer(self, counted: Counted, dials: Dials, *, part: bool) -> float:
        """Accuracy in per cent."""
        counted.begin()
        right = [
            counted.run(feeds | dials(len(labels)), int(feeds["attention_mask"].sum()))["logits"].argmax(-1) == labels
            for feeds, labels in (self.test[:PART] if part else self.test)
        ]
        return 100 * float(np.concatenate(right).mean())

    def beside(self, score: float, dense: float) -> float:
        """Points."""
        return score - dense

    def alike(self) -> list[dict[str, np.ndarray]]:
        """Texts of the test set, one at a time, joined and cut to `TIMED_TOKENS`."""
        assert self.dense_model.tokenizer is not None
        tokenizer = load_tokenizer(self.dense_model.tokenizer, self.dense_model.max_tokens)
        texts, found = [str(text) for text, _ in read_data(self.data).texts], []
        while len(found) < TEXTS_TIMED:
            joined = ""
            while tokenizer.encode([joined])["input_ids"].shape[1] < TIMED_TOKENS:
                joined = f"{joined} {texts.pop(0)}".strip()
            found.append(tokenizer.encode([joined], TIMED_TOKENS))
        names = {tensor.name for tensor in self.dense_model.graph().inputs}
        return [{name: value for name, value in feeds.items() if name in names} for feeds in found]


def measure(
    name: str, shared: Path, trained: Path, work: Path, *, only: set[str], texts: int | None, seconds: float, say: Say
) -> dict[str, Any]:
    """Frontier and times of a task."""
    task = Task(name, shared, trained, work, texts)
    asked = task.record["settings"]
    found: dict[str, Any] = {
        "asked": asked["sparsity"], "equal_training": task.equal_training, "wanted": {"beside": -0.5},
        "training": {key: task.record.get(key) for key in ("steps", "settings", "sparsity", "reached")}, "curves": {},
    }  # fmt: skip
    curves = [curve for curve in CURVES if curve.name in only]
    if curves:
        say(f"{name}: dense")
        value, totals = task.of_dense()
        found |= {"texts": sum(len(labels) for _, labels in task.test), "tokens": totals.tokens,
                  "dense_accuracy": value, "checkpoint_accuracy": value}  # fmt: skip
        if task.equal_training:
            model = task.compiled(task.checkpoint, ["unpad"], "checkpoint").model
            found["checkpoint_accuracy"] = task.answer(Counted(model, task.dense_onnx), no_dials, part=False)
    for curve in curves:
        say(f"{name}: {curve.name}")
        found["curves"][curve.name] = task.curve(curve, asked)
    if seconds:
        say(f"{name}: times")
        found["times"] = times(task, seconds)
    return found


def times(task: Task, seconds: float) -> dict[str, Any]:
    """Whole model and its FFNs alone, routed at the trained threshold beside dense, a text of 48 tokens at a time."""
    given, work = task.alike(), task.work
    whole: dict[str, Callable[[], object]] = {
        name: turns(open_peer(name, task.dense_onnx, 2), given) for name in (DENSE, INT8)
    }
    parts = {DENSE: ffn_part(task.dense_onnx, work / "dense.onnx")}
    parts[INT8] = ffn_part_int8(task.dense_onnx, work)
    read = record(task.dense_onnx, given, work)
    runs = {name: turns(open_part(path), read) for name, path in parts.items()}
    shares, dense = {}, task.dense()
    for feeds in given:
        dense.run(feeds, TIMED_TOKENS)
    for name, passes in ROUTED.items():
        build = task.compiled(task.routed, passes, name.replace(", ", "-").replace(" ", "-"))
        engine, turned = load(build.path), at_dials(build.manifest, 1, {})
        whole[name] = turns(engine.run, given)
        if not build.manifest.passes[0].changed:
            continue  # all FFNs are dense: the FFNs alone are the dense ones
        read = [each | turned for each in record(build.model, [feeds | turned for feeds in given], work)]
        runs[name] = turns(open_part(ffn_part(build.model, work / f"part-{build.path.name}.onnx")), read)
        counted = Counted(build.model, task.dense_onnx)
        for feeds in given:
            counted.run(feeds | turned, TIMED_TOKENS)
        shares[name] = 1 - counted.spent(dense.totals, ())["neurons"]
    taken = {
        what: interleave(those, seconds=seconds / 2, rest=REST_S) for what, those in (("model", whole), ("ffn", runs))
    }
    rows = {}
    for name in whole:
        peer = INT8 if "int8" in name else DENSE
        rows[name] = {"sparsity": shares.get(name)} | {
            f"{what}_{key}": value
            for what, timed in taken.items()
            if name in timed
            for key, value in (
                ("ms", timed[name].median_ms), ("ratio", timed[peer].median_ms / timed[name].median_ms),
            )
        }  # fmt: skip
    return {"shape": f"1x{TIMED_TOKENS}", "texts": len(given), "wanted_ffn_ratio": 1.5, "engines": rows}


def ffn_part_int8(dense: Path, work: Path) -> Path:
    """The FFNs alone of the model that ONNX Runtime's dynamic quantization makes."""
    return quantized(ffn_part(dense, work / "dense-to-quantize.onnx"))
