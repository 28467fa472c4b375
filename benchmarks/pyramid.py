"""Token pruning and early exit on fine-tuned MiniLM classifiers: accuracy, FLOPs and wall clock against dense.

python benchmarks/pyramid.py --task sst2 --minutes 60 --json     trains first, then measures
python benchmarks/pyramid.py --task sst2 --pyramid DIR           measures what was trained before

The dials are chosen on a part of the training set that the pyramid did not learn from: the fewest FLOPs at which
accuracy is no more than `--drop` points below that of speed 0. Accuracy and FLOPs are then those of the whole test
set, FLOPs counted as they were executed; the dense model's are those of each text without padding. Times are of real
texts as they come, alone and in batches of 32, two threads, all engines in turns.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.cost import Cost, Counter
from trimtab.compiler.checks.executed import total
from trimtab.compiler.checks.frontier import cheapest, grid, walk
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.checks.speed import this_machine
from trimtab.compiler.checks.timing import REST_S, interleave
from trimtab.compiler.data import batches, read_data
from trimtab.compiler.engine import Engine
from trimtab.compiler.sources import Source

HERE = Path(__file__).resolve().parent
TOKENS = {"sst2": 64, "agnews": 96, "imdb": 256}
DEV = 2000
"""Last lines of the training set, which choose the dials; half of them where texts are long."""

HALVED = {"sst2"}
"""Tasks whose dials one half of the test set chooses for the other, and the other way round: the training set of SST-2
has many phrases of one sentence, so that no part of it is unseen."""

TIMED = {1: 128, 32: 8}
"""Batch → batches that are timed; half as many where texts are long."""

PEERS = ("dense-fp32", "dense-int8", "openvino-fp32", "openvino-bf16")
GRID = {
    "prune": (0.0, 0.5, 1.0, 1.4),
    "exit_threshold": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.75),
    "route_threshold": (0.5,),
}

PYRAMID = ["unpad", "token-prune", "early-exit"]
VARIANTS: dict[str, list[Any]] = {
    "unpad": PYRAMID[:1],
    "prune": PYRAMID[:2],
    "exit": [PYRAMID[0], PYRAMID[2]],
    "both": PYRAMID,
    "both + ffn-split": [{"ffn-split": {"budget": {"time": 0.65}}}, *PYRAMID],
    "int8": [{"dynamic-int8": {"scales": "row"}}],
    "both, int8": [*PYRAMID, {"dynamic-int8": {"scales": "row"}}],
    "static int8": ["static-int8", {"dynamic-int8": {"scales": "row"}}],
    "both, static int8": ["static-int8", *PYRAMID, {"dynamic-int8": {"scales": "row"}}],
}
AS_BOTH = ("both + ", "both, ")
"""Variants that run at the dials which "both" chose."""


class Task:
    """A task's data, and its dense model.

    Attributes:
        dev: how many texts choose dials.
        folds: texts that choose dials, and those that judge them.
    """

    def __init__(self, name: str, shared: Path, dense: Path, work: Path) -> None:
        self.name, self.tokens = name, TOKENS[name]
        self.is_long = self.tokens > 128
        self.dev = DEV // 2 if self.is_long else DEV
        lines = gzip.decompress((shared / "data" / name / "train.jsonl.gz").read_bytes()).splitlines(keepends=True)
        self.train, self.test = work / "train.jsonl", shared / "data" / name / "test.jsonl.gz"
        self.train.write_bytes(b"".join(lines[:-DEV]))
        dev, halves = work / "dev.jsonl", [work / "even.jsonl", work / "odd.jsonl"]
        dev.write_bytes(b"".join(lines[-DEV:]))
        self.folds = [(dev, self.test)]
        if name in HALVED:
            lines = gzip.decompress(self.test.read_bytes()).splitlines(keepends=True)
            for start, half in enumerate(halves):
                half.write_bytes(b"".join(lines[start::2]))
            self.folds = [(halves[0], halves[1]), (halves[1], halves[0])]
        self.dense: Source = open_source(dense)

    def feeds(self, data: Path, size: int, samples: int | None = None) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Batches of `size` texts as they come, with their labels."""
        dataset = read_data(data)
        count = min(samples or dataset.count, dataset.count)
        labels = np.array([label for _, label in dataset.sample(count, 0)])
        inputs, start = self.dense.graph().inputs, 0
        for feeds in batches(dataset, self.dense, size, self.tokens, count, inputs=inputs):
            rows = len(feeds["input_ids"])
            yield feeds, labels[start : start + rows]
            start += rows


Batches = list[tuple[dict[str, Any], np.ndarray]]
Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


def judge(run: Run, given: Batches) -> float:
    """Accuracy in per cent."""
    right = [run(feeds)["logits"].argmax(-1) == labels for feeds, labels in given]
    return 100 * float(np.concatenate(right).mean())


def executed(count: Counter, engine: Engine, given: Batches, dials: Mapping[str, float]) -> tuple[Cost, float]:
    """What all of `given` costs together at one setting, and accuracy in per cent."""
    costs: list[Cost] = []

    def run(feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        turned = engine.manifest.all_dials.feeds(len(feeds["input_ids"]), dials)
        cost, outputs = count.run({name: feeds[name] for name in count.inputs if name in feeds} | turned)
        costs.append(cost)
        return outputs

    accuracy = judge(run, given)
    return total(costs), accuracy


def of_dense(model: Path, given: Batches) -> int:
    """FLOPs of the dense model on each text by itself, so that padding is no saving."""
    count, known, flops = Counter(model), dict[int, int](), 0
    for feeds, _ in given:
        for row, tokens in enumerate(feeds["attention_mask"].sum(-1).tolist()):
            if tokens not in known:
                known[tokens] = count({name: each[row : row + 1, :tokens] for name, each in feeds.items()}).flops
            flops += known[tokens]
    return flops


def choose(
    engine: Engine, count: Counter, given: Batches, drop: float, exact: float | None = None,
    values: Mapping[str, Sequence[float]] = GRID,
) -> dict[str, float]:  # fmt: skip
    """The dials of fewest FLOPs among those whose accuracy is at most `drop` points below `exact`.

    Args:
        exact: accuracy on `given`; by default that of the build at its exact setting.
        values: dial → values that are tried, beside its exact one.
    """

    def measure(dials: dict[str, float]) -> tuple[int, float]:
        cost, accuracy = executed(count, engine, given, dials)
        return cost.flops, accuracy

    points = list(walk(grid(engine.dials, {dial.name: values[dial.name] for dial in engine.dials}), measure).values())
    least = (points[0].score if exact is None else exact) - drop
    chosen = cheapest(points, least) or max(points, key=lambda point: point.score)
    return chosen.dials


def recipe_of(task: Task, passes: Sequence[Any]) -> dict[str, Any]:
    """`passes`, for texts alone and in batches of 32, on two threads."""
    return {"passes": list(passes), "threads": 2, "workload": {"batch": [1, 1, 32], "tokens": [1, 64, task.tokens]}}


def add_times(
    task: Task, runs: Mapping[str, Run], engines: Mapping[str, dict[str, Any]], seconds: float
) -> dict[int, float]:  # fmt: skip
    """Time `runs` in turns, on texts of the test set as they come, and put the times into `engines`.

    Args:
        engines: by the names of `runs`, of which one is "dense-fp32".
        seconds: for each batch size; 0 times nothing.

    Returns:
        Batch size → share of padding.
    """
    padding: dict[int, float] = {}
    for size, many in (TIMED if seconds else {}).items():
        many = many // 2 if task.is_long else many
        given = [feeds for feeds, _ in task.feeds(task.test, size, size * many)]
        padding[size] = 1 - float(np.concatenate([feeds["attention_mask"].ravel() for feeds in given]).mean())
        timings = interleave(
            {name: partial(_all, run, given) for name, run in runs.items()}, seconds=seconds, block=1, warmup=1,
            rest=REST_S,
        )  # fmt: skip
        for name, timing in timings.items():
            engines[name][f"ms_{size}"] = timing.median_ms / many
            engines[name][f"vs_fp32_{size}"] = timings["dense-fp32"].median_ms / timing.median_ms
    return padding


def train(task: Task, shared: Path, out: Path, minutes: float, say: Callable[[str], None]) -> Path:
    """A pyramid of the dense model."""
    from trimtab.training.contract import Job
    from trimtab.training.magic_pyramid.learn import learn
    from trimtab.training.magic_pyramid.settings import Settings

    say(f"{task.name}: {minutes:g} minutes of training")
    settings = Settings(minutes=minutes, max_tokens=task.tokens)
    trained = learn(Job(model=task.dense.origin, dataset=read_data(task.train), recipe=None, out=out), settings)
    assert trained is not None
    trained.write(out)
    return out


def main(
    task: Annotated[str, typer.Option(help="sst2, agnews or imdb.")],
    pyramid: Annotated[Path | None, typer.Option(help="Trained before; its folder.")] = None,
    dense: Annotated[Path | None, typer.Option(help="The dense model; by default the evaluation's checkpoint.")] = None,
    minutes: Annotated[float, typer.Option(help="Of training, if none is given.")] = 60.0,
    drop: Annotated[float, typer.Option(help="Points below speed 0, on the part that chooses.")] = 0.5,
    seconds: Annotated[float, typer.Option(help="Of timing, for each batch size; 0 times nothing.")] = 60.0,
    texts: Annotated[int | None, typer.Option(help="Of the test set, at most; by default all.")] = None,
    only: Annotated[str, typer.Option(help="Variants, by semicolons.")] = ";".join(VARIANTS),
    shared: Annotated[Path, typer.Option(help="Folder with data/ and models/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    if not shared.is_dir():
        sys.exit(f"{shared}: no such folder; the checkpoints and data of the evaluation are needed (--shared FOLDER)")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="trimtab-pyramid-") as folder:
        work = Path(folder)
        it = Task(task, shared, dense or shared / "models" / task, work)
        trained = pyramid or train(it, shared, work / "pyramid", minutes, say)
        results: dict[str, Any] = {"command": " ".join(sys.argv), "versions": package_versions(),
                   "machine": this_machine(2).model_dump(mode="json"), "task": task, "drop": drop}  # fmt: skip
        variants = {name: VARIANTS[name] for name in VARIANTS if name in only.split(";")}
        results |= measure(it, trained, variants, drop, seconds, texts, work, say)
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results))
        return
    for name, row in results["engines"].items():
        print(name, {key: value for key, value in row.items() if key != "passages"})


def measure(
    task: Task, pyramid: Path, variants: Mapping[str, list[Any]], drop: float, seconds: float, texts: int | None,
    work: Path, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, FLOPs and time of variants, and of the dense model in several runtimes."""
    folds = [(list(task.feeds(dev, 32, task.dev)), list(task.feeds(test, 32, texts))) for dev, test in task.folds]
    test = [batch for _, judging in folds for batch in judging]
    onnx = task.dense.onnx
    runs: dict[str, Run] = {name: open_peer(name, onnx, 2) for name in PEERS}
    whole, of_both = of_dense(onnx, test), list[dict[str, float]]()
    engines: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        engines[name] = {"accuracy": judge(run, test), "flops": 1.0}
    for name, passes in variants.items():
        say(f"{task.name}: {name}")
        build = compile_model(pyramid, recipe_of(task, passes), work / "build", force=True)
        engine, count = load(build.path), Counter(build.model, 2)
        dials: list[dict[str, float]] = [{}] * len(folds)
        if engine.dials:
            dials = of_both if name.startswith(AS_BOTH) else [choose(engine, count, dev, drop) for dev, _ in folds]
        runs[name] = partial(engine.run, dials=dials[0])
        costs, right = zip(
            *(executed(count, engine, judging, own) for own, (_, judging) in zip(dials, folds, strict=True)),
            strict=True,
        )  # fmt: skip
        sizes = [sum(len(labels) for _, labels in judging) for _, judging in folds]
        cost, accuracy = total(costs), float(np.average(right, weights=sizes))
        less = whole / cost.flops if PYRAMID[0] in passes else 1.0  # the others compute padding, too, as dense does
        engines[name] = {"accuracy": accuracy, "flops": less, "dials": dials[0] if len(dials) == 1 else dials,
                         "passages": [passage.model_dump() for passage in cost.passages]}  # fmt: skip
        reached = engines["dense-fp32"]["accuracy"]
        if name == "both":
            of_both, engines[name]["exact_accuracy"] = dials, judge(partial(engine.run, speed=0), test)
        say(f"  accuracy {accuracy:.2f} (dense {reached:.2f}), FLOPs {less:.2f} times fewer, {dials}")
    return {"padding": add_times(task, runs, engines, seconds), "engines": engines}


def _all(run: Run, given: list[dict[str, Any]]) -> None:
    for feeds in given:
        run(feeds)


if __name__ == "__main__":
    typer.run(main)
