"""FFSplit against what a user would try first, on fine-tuned MiniLM classifiers: size and time against accuracy.

python benchmarks/ffsplit.py --json                    everything, with ten minutes of training per engine
python benchmarks/ffsplit.py --task sst2 --parts size  one part of it

Peers: the same FFNs in int8, int4 and int2 throughout, by plain low rank (SVD weighted by the activations), and with
all but the heavy hitters dropped; for time, the dense engine of the same precision in the same run. FFN bytes are those
on disk, as a share of fp32; times are medians on two threads, each engine in turns with the dense ones of the same run;
accuracy is on the whole test set, which nothing was fitted or chosen on.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.checks.bench import bench
from trimtab.compiler.data import Dataset, batches, read_data
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.targets import get_target
from trimtab.passes.profile import Profile

HERE = Path(__file__).resolve().parent
SHAPES = [(1, 48), (8, 48)]
TOKENS = {"sst2": 64, "agnews": 96}
WORDS = {"sst2": 8, "agnews": 1}  # fewest of a text to learn from: SST-2 trains on phrases and is asked for sentences

Passes = list[str | dict[str, Any]]


class Precision(str, Enum):
    """What a trained engine computes in."""

    fp32 = "fp32"
    int8 = "int8"


def split(**options: Any) -> Passes:
    """A recipe of nothing but ffn-split."""
    return [{"ffn-split": options}]


SIZE: list[tuple[str, Passes]] = [
    ("int8", split(heavy=1.0, heavy_form="int8", block=64)),
    *(("int4", split(heavy=1.0, heavy_form="int4", block=block)) for block in (32, 64, 128)),
    ("int2", split(heavy=0.0, rest_form="int2", block=32)),
    *(("svd", split(heavy=0.0, rest_form="low-rank", rank=rank)) for rank in (192, 96, 48)),
    *(("ffsplit", split(budget={"size": size}, block=128)) for size in (0.11, 0.125, 0.15)),
]
TIME: list[tuple[str, Passes]] = [
    ("dense", []),
    ("int8", ["dynamic-int8"]),
    ("int4", split(heavy=1.0, heavy_form="int4", block=64)),
    *(("svd", split(heavy=0.0, rest_form="low-rank", rank=rank)) for rank in (192, 96, 48)),
    *(("drop", split(heavy=share, rest_form="drop")) for share in (0.5, 0.25, 0.125)),
    *(("ffsplit", split(budget={"time": time})) for time in (0.4, 0.25, 0.15)),
    *(("ffsplit + int8", [*split(budget={"time": time}), "dynamic-int8"]) for time in (0.4, 0.25, 0.15)),
]


class Task:
    """A fine-tuned checkpoint, its data, and a Profile of it."""

    def __init__(self, name: str, shared: Path, work: Path) -> None:
        self.name, self.work = name, work
        self.source: Source = open_source(shared / "models" / name)
        self.train, self.test = (shared / "data" / name / f"{part}.jsonl.gz" for part in ("train", "test"))
        self.profile_path = work / f"{name}.profile"
        settings = load_recipe(HERE / "recipes" / "size.yaml").calibration
        profile = calibrate(self.source, read_data(self.train), **settings.model_dump())
        profile.save(self.profile_path)
        self.dense = self.accuracy(self.build("dense", {"passes": []}))

    def lessons(self) -> Dataset:
        """The training set without texts that are shorter than what is served."""
        path = self.work / f"{self.name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for text, label in read_data(self.train).texts:
                if len(text.split()) >= WORDS[self.name]:
                    file.write(json.dumps({"text": text, "label": label}) + "\n")
        return read_data(path)

    def build(self, name: str, recipe: dict[str, Any], profile: Path | None = None) -> Build:
        limits = {"workload": {"batch": [1, 8, 32], "tokens": [8, 48, TOKENS[self.name]]}}
        wanted = profile or (self.profile_path if recipe["passes"] else None)
        return compile_model(
            self.source, limits | recipe, self.work / f"{self.name}-{name}", profile=wanted, force=True
        )

    def accuracy(self, build: Build) -> float:
        """Percent of the test set."""
        engine, dataset = load(build.path, threads=2), read_data(self.test)
        labels = [label for _, label in dataset.sample(dataset.count, 0)]
        right: list[bool] = []
        for feeds in batches(
            dataset, self.source, 32, TOKENS[self.name], dataset.count, inputs=self.source.graph().inputs
        ):
            found = engine.run(feeds)["logits"].argmax(-1)
            right.extend(found == labels[len(right) : len(right) + len(found)])
        return 100 * float(np.mean(right))

    def point(self, curve: str, passes: Passes, seconds: float) -> dict[str, Any]:
        """One point of a frontier; timed for `seconds` at each of `SHAPES`, if at all."""
        build = self.build("point", {"passes": passes})
        sizes = build.manifest.sizes
        assert sizes.compiled_ffn_bytes is not None
        found = {
            "curve": curve,
            "passes": passes,
            "accuracy": self.accuracy(build),
            "ffn_bytes": sizes.compiled_ffn_bytes / sizes.dense_ffn_bytes,
        }
        if seconds:
            runs = bench(build, shapes=SHAPES, threads=2, seconds=seconds).runs
            found["median_ms"] = {
                f"{batch}x{tokens}": {run.name: run.median_ms for run in runs if run.batch == batch}
                for batch, tokens in SHAPES
            }
        return found


def timed(
    task: Task, precision: str, training: dict[str, Any], seconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """The recovered split in fp32 or in dynamic int8, against the dense engine of its precision."""
    from trimtab.training.recover.recover import recover
    from trimtab.training.recover.settings import Settings

    file = HERE / "recipes" / f"time-{precision}.yaml"
    recipe, passes = load_recipe(file), yaml.safe_load(file.read_text())["passes"]
    settings = Settings(**training, max_tokens=TOKENS[task.name])
    say(f"{task.name}: {settings.minutes:g} minutes of recovery training for {precision}")
    capability, profile = get_target(recipe.target).probe(), Profile.load(task.profile_path)
    learned = recover(task.source, recipe, task.lessons(), profile, settings, capability=capability)
    path = task.work / f"{task.name}.{precision}.profile"
    learned.save(path)
    record = learned.info.learned["recover"]
    build = task.build(precision, {"passes": passes}, path)
    dense = task.dense
    if precision == "int8":
        dense = task.accuracy(task.build("dense-int8", {"passes": ["dynamic-int8"]}))
    runs = bench(build, shapes=SHAPES, threads=2, seconds=seconds).runs
    return {
        "passes": passes,
        "training": {key: record[key] for key in (*training, "steps", "before", "after")},
        "accuracy": task.accuracy(build),
        "dense_accuracy_same_precision": dense,
        "speedup": {f"{run.batch}x{run.tokens}": run.ratio for run in runs if run.name == f"dense-{precision}"},
        "runs": [run.model_dump() for run in runs],
    }


def main(
    task: Annotated[list[str] | None, typer.Option(help="sst2 or agnews; both by default.")] = None,
    parts: Annotated[str, typer.Option(help="Some of size,time,trained.")] = "size,time,trained",
    minutes: Annotated[float, typer.Option(help="Of recovery training per engine.")] = 10.0,
    labels_weight: Annotated[float, typer.Option(help="Of the labels in training; 0 is distillation alone.")] = 0.0,
    lr: Annotated[float, typer.Option(help="Of that training.")] = 5e-5,
    batch_size: Annotated[int, typer.Option(help="Of that training.")] = 32,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="To train for: fp32 or int8; both by default.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Of timing per shape and precision.")] = 20.0,
    shared: Annotated[Path, typer.Option(help="Folder with data/ and models/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    if not shared.is_dir():
        sys.exit(f"{shared}: no such folder; the checkpoints and data of the evaluation are needed (--shared FOLDER)")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results: dict[str, Any] = {"versions": package_versions(), "command": " ".join(sys.argv), "tasks": {}}
    with tempfile.TemporaryDirectory(prefix="trimtab-ffsplit-") as work:
        for name in task or ["sst2", "agnews"]:
            say(f"{name}: calibrating")
            it = Task(name, shared, Path(work))
            found = results["tasks"][name] = {"dense_accuracy": it.dense}
            if "trained" in parts.split(","):
                training = {"minutes": minutes, "lr": lr, "batch_size": batch_size, "labels_weight": labels_weight}
                found["trained"] = {p.value: timed(it, p.value, training, seconds, say) for p in precision or Precision}
            for part, points, each in (("size", SIZE, 0.0), ("time", TIME, seconds / 4)):
                if part in parts.split(","):
                    found[part] = []
                    for number, (curve, passes) in enumerate(points):
                        say(f"{name}: {part} {number + 1}/{len(points)} {curve} {passes}")
                        found[part].append(it.point(curve, passes, each))
    text = json.dumps(results, indent=1)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    if as_json:
        print(text)
    else:
        show(results)


def show(results: dict[str, Any]) -> None:
    """The same as tables."""
    for name, found in results["tasks"].items():
        dense = found["dense_accuracy"]
        print(f"\n{name}: dense {dense:.2f} %")
        for part in ("size", "time"):
            for row in found.get(part, []):
                cost = f"{row['ffn_bytes']:7.2%} of the bytes"
                if "median_ms" in row:
                    ratios = [times["dense-fp32"] / times["compiled"] for times in row["median_ms"].values()]
                    cost += f", {' and '.join(f'{ratio:.2f}' for ratio in ratios)} times as fast"
                print(f"  {part:5} {row['curve']:14} {cost}  {row['accuracy']:.2f} ({row['accuracy'] - dense:+.2f})")
        for precision, row in found.get("trained", {}).items():
            speed = ", ".join(f"{shape}: {ratio:.2f}x" for shape, ratio in row["speedup"].items())
            less = row["accuracy"] - row["dense_accuracy_same_precision"]
            print(f"  trained {precision}: {row['accuracy']:.2f} ({less:+.2f} of dense {precision}); {speed}")


if __name__ == "__main__":
    typer.run(main)
