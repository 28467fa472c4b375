"""300 damaged inputs, the same each time, meet answers or clear refusals; `python tests/fuzz` has others."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run
from kinds import KINDS

CASES = 300 // len(KINDS)
PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_meets_no_raw_error(kind: str, part: int, tmp_path: Path) -> None:
    outcomes = [run(kind, seed, tmp_path) for seed in range(part, CASES, PARTS)]
    again = f"python tests/fuzz --kind {kind} --cases 1 --seed"
    faults = [f"{o.fault} ({again} {o.seed}): {o.said}" for o in outcomes if o.fault]
    assert not faults, "\n".join(faults)
