"""Compiles kernels ahead of time to PTX for a GPU generation. No GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.plugins.dialect import Form
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile
from trimtab.plugins.gpu.ptx import only_parameters

__all__ = ["CAPABILITIES", "Compiled", "arguments", "compile_kernel"]

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, major and minor, that kernels are compiled and checked for."""

_TYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int8)": "i8",
    "tensor(int32)": "i32",
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as TensorRT embeds it.

    Attributes:
        name: of its entry.
        ptx: its text. The entry's parameters are pointers to the inputs that are given, 32-bit sizes, and the pointers
            to the outputs that are named and to the sizes that it counts; nothing else.
        threads: of a block.
        shared_bytes: of dynamic shared memory.
        constants: what was known at compile time.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    constants: dict[str, Any]


def arguments(kernel: GpuKernel, form: Form) -> tuple[str, ...]:
    """Names of the run-time parameters, in order."""
    given = [i.name for i in kernel.op.inputs if i.name in form.given]
    return (*given, *kernel.sizes, *(o.name for o in kernel.op.named(form)), *kernel.counted)


def compile_kernel(
    kernel: GpuKernel, form: Form, shapes: Shapes, tile: Tile, capability: int, ptx_version: int | None = None
) -> Compiled:
    """Compile `kernel` for GPUs of `capability`, such as 90.

    Args:
        form: which inputs are given, of which types.
        shapes: of the inputs; only sizes that are constants of a model are looked at.
        ptx_version: of the language, such as 87 for 8.7, for drivers that take none newer; by default that of the
            assembler which comes with the Triton language.

    Raises:
        ValueError: there is no kernel for this form, or the Triton language would need memory of its own for it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing; unset it")
    if (reason := kernel.refuses(form, shapes)) is not None:
        raise ValueError(f"{kernel.op.name}: {reason}")
    constants = kernel.constants(form, shapes, tile)
    signature, fixed, aligned = {}, dict(constants), {}
    types = {**form.given, **{o.name: o.type_in(form.given) for o in kernel.op.named(form)}}
    types |= dict.fromkeys(kernel.counted, "tensor(int32)")
    for position, name in enumerate(kernel.function.arg_names):
        if name in types:
            signature[name] = f"*{_TYPES[types[name]]}"
            aligned[(position,)] = [["tt.divisibility", 16]]  # tensors of a runtime are, by far more
        elif name in kernel.sizes:
            signature[name] = "i32"
        else:
            signature[name] = "constexpr"
            fixed.setdefault(name, None)
    source = ASTSource(kernel.function, signature, fixed, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "ptx_version": ptx_version}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = only_parameters(binary.asm["ptx"], len(arguments(kernel, form)))
    return Compiled(binary.metadata.name, ptx, tile.warps * 32, binary.metadata.shared, constants)


def forms(kernel: GpuKernel, float_: str, weight: str, names: Sequence[str], **attributes: int | str) -> Form:
    """A form of the op with the optional inputs `names`, activations of type `float_` and weights of type `weight`."""
    given = {}
    for i in kernel.op.inputs:
        if i.optional and i.name not in names:
            continue
        weights = "tensor(int8)" in i.types
        given[i.name] = i.types[0] if len(i.types) == 1 else weight if weights else float_
    return Form(given, {a.name: attributes.get(a.name, a.default) for a in kernel.op.attributes})
