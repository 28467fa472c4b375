"""Every GPU kernel compiled for every GPU generation, which needs no GPU: registers, spills, shared memory.

    python benchmarks/gpu/ptx.py [--json FILE]

All ops, types and tiles at the shapes of LLaMA-7B. A tile that spills or wants more than 48 KB of shared memory is not
offered to TensorRT's builder; this says which those are.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import triton
from rich.progress import track

from trimtab.plugins.gpu.compile import CAPABILITIES, compile_kernel, forms
from trimtab.plugins.gpu.kernel import GpuKernel
from trimtab.plugins.gpu.ptx import SHARED_BUDGET, assemble
from trimtab.plugins.select_blocks.gpu import KERNEL as SELECT
from trimtab.plugins.sparse_down.gpu import KERNEL as DOWN
from trimtab.plugins.sparse_head.gpu import KERNEL as HEAD
from trimtab.plugins.sparse_up.gpu import KERNEL as UP

HALF, BRAIN, FLOAT, INT8 = "tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(int8)"
TYPES = ((HALF, HALF), (BRAIN, BRAIN), (FLOAT, FLOAT), (HALF, INT8), (BRAIN, INT8), (FLOAT, INT8))
SHAPES = {"scores": (1, 11008), "up": (11008, 4096), "gate": (11008, 4096), "down": (11008, 4096),
          "weight": (32000, 4096)}  # fmt: skip
OPTIONS: dict[str, dict[str, int | str]] = {"SelectBlocks": {"k": 550}, "SparseUp": {"activation": "silu"}}


def kernels() -> list[tuple[GpuKernel, str, str, int]]:
    found = [(kernel, *types, sm) for kernel, types, sm in product((UP, DOWN, HEAD), TYPES, CAPABILITIES)]
    return found + [(SELECT, kind, kind, sm) for kind, sm in product((HALF, BRAIN, FLOAT), CAPABILITIES)]


def compiled(kernel: GpuKernel, float_: str, weight: str, sm: int) -> list[dict[str, Any]]:
    """What became of each tile."""
    scales = {"SparseUp": ("up_scale", "gate_scale"), "SparseDown": ("down_scale",), "SparseHead": ("weight_scale",)}
    names = [*scales.get(kernel.op.name, ())] if weight == INT8 else []
    form = forms(kernel, float_, weight, ["gate", "up_bias", *names], **OPTIONS.get(kernel.op.name, {}))
    shapes = {name: shape for name, shape in SHAPES.items() if name in form.given}
    rows = []
    for tile in kernel.tiles(form, shapes):
        made = compile_kernel(kernel, form, shapes, tile, sm)
        found = assemble(made.ptx, sm)
        rows.append({
            "op": kernel.op.name, "float": float_[7:-1], "weights": weight[7:-1], "sm": sm, "tile": repr(tile),
            "registers": found.registers, "spilled_bytes": found.spilled_bytes, "shared_bytes": made.shared_bytes,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    started = time.monotonic()
    rows = [row for one in track(kernels(), "compiling") for row in compiled(*one)]
    spilled = [row for row in rows if row["spilled_bytes"]]
    large = [row for row in rows if row["shared_bytes"] > SHARED_BUDGET]
    for row in [*spilled, *large]:
        print(row)
    print(f"{len(rows)} kernels, all assembled; {len(spilled)} spill, {len(large)} want more than 48 KB")
    if options.json:
        most = {
            f"{op} sm_{sm}": {key: max(row[key] for row in rows if (row["op"], row["sm"]) == (op, sm))
                              for key in ("registers", "shared_bytes")}
            for op, sm in product(sorted({row["op"] for row in rows}), CAPABILITIES)
        }  # fmt: skip
        found = {"command": "python benchmarks/gpu/ptx.py --json FILE", "triton": triton.__version__,
                 "kernels": len(rows), "spilled": spilled, "more_than_48_kb": large, "most": most,
                 "seconds": time.monotonic() - started}  # fmt: skip
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
