"""Reading memory: the sum of an array far larger than the caches, as STREAM's kernels without a store.

memory_steps.py BYTES THREADS
"""

from __future__ import annotations

import sys

import torch
from serve import serve


def main(size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    array = torch.ones(size // 4)
    serve({}, step=array.sum)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
