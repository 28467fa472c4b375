"""Reading memory: the sum of an array far larger than the caches, as STREAM's kernels without a store.

Options: size (bytes), threads.
"""

from __future__ import annotations

import torch

from trimtab.compiler.checks.decoders.steps.serve import serve, start


def main(size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    array = torch.ones(size // 4)
    serve({}, step=array.sum)


if __name__ == "__main__":
    start(main)
