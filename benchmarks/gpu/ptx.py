"""Every GPU kernel compiled for every GPU generation, which needs no GPU: registers, spills, shared memory.

    python benchmarks/gpu/ptx.py [--json FILE] [--only OP]

All ops, types and tiles at the shapes of LLaMA-7B, with one count and with counts that differ from token to token, and
attention with heads of 16 to 128, with and without a bias. A tile that spills or wants more than 48 KB of shared memory
is not offered to TensorRT's builder; this says which those are. `--only OP` compiles one op's alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from rich.progress import track

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.compile import CAPABILITIES, compile_kernel, forms
from trimtab.plugins.gpu.kernel import GpuKernel
from trimtab.plugins.gpu.ptx import SHARED_BUDGET, assemble
from trimtab.plugins.packed_attention.gpu import KERNELS as ATTENTION
from trimtab.plugins.select_blocks.gpu import KERNEL as SELECT
from trimtab.plugins.sparse_down.gpu import KERNEL as DOWN
from trimtab.plugins.sparse_head.gpu import KERNEL as HEAD
from trimtab.plugins.sparse_up.gpu import KERNEL as UP

HALF, BRAIN, FLOAT, INT8 = "tensor(float16)", "tensor(bfloat16)", "tensor(float)", "tensor(int8)"
TYPES = ((HALF, HALF), (BRAIN, BRAIN), (FLOAT, FLOAT), (HALF, INT8), (BRAIN, INT8), (FLOAT, INT8))
SHAPES = {"scores": (1, 11008), "up": (11008, 4096), "gate": (11008, 4096), "down": (11008, 4096),
          "weight": (32000, 4096)}  # fmt: skip
HEADS, DIMS = 12, (16, 32, 64, 128)
OPTIONS: dict[str, dict[str, int | str]] = {"SelectBlocks": {"k": 550}, "SparseUp": {"activation": "silu"}}


@dataclass(frozen=True)
class Case:
    """One kernel in one form, at some shapes."""

    kernel: GpuKernel
    form: Form
    shapes: Mapping[str, tuple[int, ...]]


def cases() -> list[Case]:
    found = [
        _sparse(kernel, *types, counts)
        for kernel, types in product((UP, DOWN, HEAD), TYPES)
        for counts in _counts(kernel)
    ]
    found += [_sparse(SELECT, kind, kind, counts) for kind in (HALF, BRAIN, FLOAT) for counts in _counts(SELECT)]
    parts = product(ATTENTION, (HALF, BRAIN, FLOAT), DIMS, (False, True))
    return found + [_attention(*part) for part in parts]


def _counts(kernel: GpuKernel) -> tuple[dict[str, int | str], ...]:
    """The same number of blocks for all tokens, and one that differs."""
    differ = any(attribute.name == "at_most" for attribute in kernel.op.attributes)
    return ({}, {"at_most": 1}) if differ else ({},)


def _sparse(kernel: GpuKernel, float_: str, weight: str, counts: Mapping[str, int | str]) -> Case:
    scales = {"SparseUp": ("up_scale", "gate_scale"), "SparseDown": ("down_scale",), "SparseHead": ("weight_scale",)}
    names = [*scales.get(kernel.op.name, ())] if weight == INT8 else []
    form = forms(kernel, float_, weight, ["gate", "up_bias", *names], **OPTIONS.get(kernel.op.name, {}), **counts)
    return Case(kernel, form, {name: shape for name, shape in SHAPES.items() if name in form.given})


def _attention(kernel: GpuKernel, float_: str, dim: int, biased: bool) -> Case:
    """q, k and v side by side, as `unpad` makes them."""
    form = forms(kernel, float_, float_, ["bias"] if biased else [], heads=HEADS)
    shapes = {"q": (-1, 3 * HEADS * dim), "offsets": (-1,), "log_sum_exp": (-1, HEADS), "bias": (1, HEADS, -1, -1)}
    return Case(kernel, form, {name: shape for name, shape in shapes.items() if name in form.given})


def compiled(case: Case, sm: int) -> list[dict[str, Any]]:
    """What became of each tile."""
    rows = []
    types = [case.form.given[i.name][7:-1] for i in case.kernel.op.inputs if i.name in case.form.given]
    for tile in case.kernel.tiles(case.form, case.shapes):
        made = compile_kernel(case.kernel, case.form, case.shapes, tile, sm)
        found = assemble(made.ptx, sm)
        rows.append({
            "op": case.kernel.op.name, "types": types, "attributes": case.form.attributes, "shapes": case.shapes,
            "sm": sm, "tile": repr(tile),
            "registers": found.registers, "spilled_bytes": found.spilled_bytes, "shared_bytes": made.shared_bytes,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--only", help="an op, such as SparseUp")
    options = parser.parse_args()
    started = time.monotonic()
    wanted = [(case, sm) for case in cases() if options.only in (None, case.kernel.op.name) for sm in CAPABILITIES]
    rows = [row for each in track(wanted, "compiling") for row in compiled(*each)]
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
