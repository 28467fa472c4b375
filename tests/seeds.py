"""Random numbers of a test: another seed each time, printed, so that a failure can be had again."""

from __future__ import annotations

import numpy as np


def seeded() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
