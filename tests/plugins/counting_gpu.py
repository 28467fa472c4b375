"""The GPU kernel of the op for tests. Run as a script with TRITON_INTERPRET=1, it is checked on the CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from counting import COUNTING

from trimtab.plugins.gpu import GpuKernel, Tile
from trimtab.plugins.gpu.launch import prepared


@triton.jit
def counting(x, n, values, total, places, found, COLUMNS: tl.constexpr):
    written = 0
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, n, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        value = tl.load(x + at, mask=at < n, other=0.0)
        chosen = (value != 0) & (at < n)
        to = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(values + to, value, mask=chosen)
        if places is not None:
            tl.store(places + to, at, mask=chosen)
        sums += value.to(tl.float32)
        written += tl.sum(chosen.to(tl.int32), 0)
    if total is not None:
        tl.store(total, tl.sum(sums, 0).to(total.dtype.element_ty))
    tl.store(found, written)


KERNEL = GpuKernel(
    COUNTING,
    counting,
    ("n",),
    measure=lambda shapes: {"n": shapes["x"][0]},
    constants=lambda form, shapes, tile: {"COLUMNS": tile.columns},
    grid=lambda sizes, constants, tile: (1, 1, 1),
    tiles=lambda form, shapes: (Tile(1, 1, 64, 2), Tile(1, 1, 128, 4)),
    refuses=lambda form, shapes: None,
    counted=("found",),
)


if __name__ == "__main__":
    for unnamed in ((), ("total",), ("places",), ("total", "places")):
        x = torch.randn(300) * (torch.rand(300) < 0.3)
        run, outputs = prepared(KERNEL, {"x": x}, {}, unnamed=unnamed)
        run()
        names = [o.name for o in COUNTING.outputs if o.name not in unnamed] + ["found"]
        results = dict(zip(names, outputs, strict=True))
        count = int(results["found"])
        assert count == int((x != 0).sum()) and torch.equal(results["values"][:count], x[x != 0]), unnamed
        assert "places" in unnamed or torch.equal(results["places"][:count].long(), x.nonzero()[:, 0])
        assert "total" in unnamed or abs(float(results["total"] - x.sum())) < 1e-3
