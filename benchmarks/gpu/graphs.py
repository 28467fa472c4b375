"""Time on a GPU: CUDA graphs of many launches, and the bandwidth of a copy that their bytes are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 15


def seconds(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median time of all `calls` in one CUDA graph, from events around each replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for before, after in marks:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3


def copy_bandwidth(size: int = 1 << 32) -> float:
    """Bytes per second, read and written, of torch's copy of `size` bytes from device to device."""
    source = torch.randn(size // 4, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        target.copy_(source)
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return 2 * size / statistics.median(times)
