"""300 damaged inputs, others each time, meet answers or clear refusals; `python tests/fuzz --cases 6000` has more."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import run
from kinds import KINDS
from seeds import seeded

PARTS = 5


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_meets_no_raw_error(kind: str, part: int, tmp_path: Path) -> None:
    first = int(seeded().integers(1 << 30))
    outcomes = [run(kind, first + i, tmp_path) for i in range(300 // PARTS // len(KINDS))]
    again = f"python tests/fuzz --kind {kind} --cases 1 --seed"
    faults = [f"{o.fault} ({again} {o.seed}): {o.said}" for o in outcomes if o.fault]
    assert not faults, "\n".join(faults)
