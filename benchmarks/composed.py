"""One recipe of all methods on a trained pyramid, and what each method adds: the same recipe without it.

python benchmarks/composed.py --task agnews --pyramid DIR --output composed-agnews.json
python benchmarks/composed.py --table composed-agnews.json --table composed-imdb.json

The dials are those of fewest FLOPs at which the whole recipe is within `--drop` points of the pyramid's own dense
model, on texts that nothing learned from and that do not judge; where a method is left out, those of the others stay.
Data, accuracy, FLOPs and times are as in pyramid.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from enum import Enum
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from pyramid import HERE, Batches, Run, Task, add_times, choose, executed, judge, of_dense, recipe_of

from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.cost import Counter
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.checks.speed import this_machine
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import Source
from trimtab.compiler.targets import get_target
from trimtab.passes import PassContext, run_passes
from trimtab.passes.profile import PROFILE, Profile

PEERS = ("dense-fp32", "dense-int8")
WHOLE, SELF = "composed", "dense self"
BELOW = ("unpad",)
"""Passes that others build upon: these are not left out."""


class Name(str, Enum):
    """A task, by its folder in the evaluation's data."""

    agnews = "agnews"
    imdb = "imdb"


DROP = {Name.agnews: 0.25, Name.imdb: 0.5}
"""Points on the texts that choose: half of what the test set may lose."""

GRID = {
    "prune": (0.5, 1.0),
    "exit_threshold": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6),
    "route_threshold": (0.5,),
}

TITLES = {Name.agnews: "AG News", Name.imdb: "IMDB"}


def variants(passes: list[Any]) -> dict[str, list[Any]]:
    """The recipe, and the recipe without each of its methods."""
    names = [each if isinstance(each, str) else next(iter(each)) for each in passes]
    without = {
        f"without {name}": passes[:place] + passes[place + 1 :] for place, name in enumerate(names) if name not in BELOW
    }
    return {WHOLE: passes} | without


def with_choices(source: Source, path: Path, passes: list[Any]) -> Profile:
    """The Profile, with what passes in front of `unpad` choose by a budget: so it is searched once for all variants."""
    profile, steps = Profile.load(path), list(load_recipe({"passes": passes}).passes)
    front = list(takewhile(lambda step: step.name not in BELOW, steps))
    context = PassContext(profile, get_target("onnxruntime").probe())
    run_passes(source.graph(), front, context)
    info = profile.info.model_copy(update={"choices": profile.info.choices | context.choices})
    return Profile(info, profile.tensors)


def measure(
    task: Task, pyramid: Path, passes: list[Any], drop: float, texts: tuple[int | None, int | None], seconds: float,
    work: Path,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy, FLOPs and time of the dense model, of the recipe, and of the recipe without each method.

    Args:
        texts: how many choose dials, and how many judge; None for all.
    """
    ((dev, test),) = task.folds
    choosing, judging = list(task.feeds(dev, 32, texts[0] or task.dev)), list(task.feeds(test, 32, texts[1]))
    itself, onnx = open_source(pyramid), task.dense.onnx
    runs: dict[str, Run] = {name: open_peer(name, onnx, 2) for name in PEERS}
    engines: dict[str, dict[str, Any]] = {
        name: {"accuracy": judge(run, judging), "flops": 1.0} for name, run in runs.items()
    }
    dense_self = open_peer(PEERS[0], itself.onnx, 2)
    engines[SELF] = {"accuracy": judge(dense_self, judging), "flops": 1.0}
    reached, whole, dials = judge(dense_self, choosing), of_dense(onnx, judging), dict[str, float]()
    profile = with_choices(itself, pyramid / PROFILE, passes)
    for name, row in engines.items():
        _say(f"{task.name}: {name} {row['accuracy']:.2f}")
    for name, steps in variants(passes).items():
        build = compile_model(itself, recipe_of(task, steps), work / name.replace(" ", "-"), profile=profile)
        engine, count = load(build.path), Counter(build.model, 2)
        if name == WHOLE:
            dials = choose(engine, count, choosing, drop, reached, GRID)
        own = {dial.name: dials[dial.name] for dial in engine.dials}
        cost, accuracy = executed(count, engine, judging, own)
        runs[name] = partial(engine.run, dials=own)
        engines[name] = {"accuracy": accuracy, "flops": whole / cost.flops, "dials": own}
        if name == WHOLE:
            engines[name]["exact_accuracy"] = judge(partial(engine.run, speed=0), judging)
        _say(f"{task.name}: {name} {accuracy:.2f}, FLOPs {whole / cost.flops:.2f} times fewer, {own}")
    return {"texts": _count(judging), "padding": add_times(task, runs, engines, seconds), "engines": engines}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each engine, with ratios of times; the last of them is what a method is worth."""
    engines = results["engines"]
    sizes = [size for size in (1, 32) if f"ms_{size}" in engines[WHOLE]]
    what = {1: "a text alone", 32: "batch of 32"}
    head = [TITLES[Name(results["task"])], "accuracy", "times fewer FLOPs"]
    for size in sizes:
        head += [f"ms, {what[size]}", "dense fp32 / it", "dense int8 / it", "without / composed"]
    lines = [head, ["---"] * len(head)]
    for name, row in engines.items():
        cells = [f"**{name}**" if name == WHOLE else name, f"{row['accuracy']:.2f} %"]
        cells.append(f"{row['flops']:.2f}" if "dials" in row else "")
        for size in sizes:
            key = f"ms_{size}"
            if key not in row:
                cells += [""] * 4
                continue
            ratios = [engines[peer][key] / row[key] for peer in PEERS]
            share = f"{row[key] / engines[WHOLE][key]:.2f}×" if name.startswith("without") else ""
            cells += [f"{row[key]:.2f}", *(f"{ratio:.2f}" for ratio in ratios), share]
        lines.append(cells)
    found = engines[WHOLE]
    told = ", ".join(f"{name} {value:g}" for name, value in found["dials"].items())
    note = f"Dials: {told}; at speed 0 the build has {found['exact_accuracy']:.2f} %. {results['texts']} texts."
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{note}"


def main(
    task: Annotated[Name, typer.Option(help="Whose data.")] = Name.agnews,
    pyramid: Annotated[Path | None, typer.Option(help="What `trimtab train --method magic-pyramid` wrote.")] = None,
    dense: Annotated[Path | None, typer.Option(help="The dense model; by default the evaluation's checkpoint.")] = None,
    recipe: Annotated[Path, typer.Option(help="All methods.")] = HERE.parent / "examples" / "composed.yaml",
    drop: Annotated[float | None, typer.Option(help="Points below dense, on texts that choose dials.")] = None,
    choosing: Annotated[int | None, typer.Option(help="Texts that choose dials, at most.")] = None,
    texts: Annotated[int | None, typer.Option(help="Of the test set, at most; by default all.")] = None,
    seconds: Annotated[float, typer.Option(help="Of timing, for each batch size; 0 times nothing.")] = 25.0,
    shared: Annotated[Path, typer.Option(help="Folder with data/ and models/.")] = HERE.parents[1] / "shared",
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    tables: Annotated[list[Path] | None, typer.Option("--table", help="Print these results; measure nothing.")] = None,
) -> None:
    """Measure, and print tables as Markdown."""
    if tables:
        print("\n\n".join(table(json.loads(path.read_text(encoding="utf-8"))) for path in tables))
        return
    if pyramid is None or not shared.is_dir():
        missing = "--pyramid FOLDER" if pyramid is None else f"{shared}: no such folder; --shared FOLDER"
        sys.exit(f"{missing}: a trained model, and the evaluation's data and checkpoints, are needed")
    passes = load_recipe(recipe).model_dump(mode="json")["passes"]
    with tempfile.TemporaryDirectory(prefix="trimtab-composed-") as folder:
        work = Path(folder)
        it, most = Task(task.value, shared, dense or shared / "models" / task.value, work), drop or DROP[task]
        results: dict[str, Any] = {"command": " ".join(sys.argv), "versions": package_versions(),
                   "machine": this_machine(2).model_dump(mode="json"), "task": task.value, "drop": most,
                   "passes": passes}  # fmt: skip
        results |= measure(it, pyramid, passes, most, (choosing, texts), seconds, work)
    if output:
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


def _count(given: Batches) -> int:
    return sum(len(labels) for _, labels in given)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
