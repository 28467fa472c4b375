"""`python tests/fuzz --cases 6000 --seed 1`: damaged inputs of every kind; fails if one of them meets a raw error."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["TRIMTAB_CACHE"] = tempfile.mkdtemp(prefix="trimtab-fuzz-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import run
from kinds import KINDS
from rich.progress import track

from trimtab.compiler.sources import trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=600, help="in all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next have the next numbers")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="these alone")
    options = parser.parse_args()
    trial.in_child = lambda path, origin: trial.read_graph(path) or "read"  # a process for each would take a second
    kinds = options.kind or list(KINDS)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="trimtab-fuzz-") as root:
        cases = [(kinds[i % len(kinds)], options.seed + i // len(kinds)) for i in range(options.cases)]
        for kind, seed in track(cases, description="cases"):
            outcomes.append(run(kind, seed, Path(root)))
    for kind in kinds:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        refused = sum(bool(outcome.said) for outcome in of_kind)
        raw = sum(outcome.fault is not None for outcome in of_kind)
        print(f"{kind}: {len(of_kind)} cases, {refused} refused, {raw} raw")
    faults = Counter(f"{outcome.kind}: {outcome.fault}" for outcome in outcomes if outcome.fault)
    for fault, count in faults.most_common():
        first = next(o for o in outcomes if f"{o.kind}: {o.fault}" == fault)
        print(f"{count} x {fault}; seed {first.seed}: {first.said}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
