"""Rewrites PTX so that TensorRT can launch it, and reads the assembler's statistics."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SHARED_BUDGET", "Assembled", "assemble", "only_parameters", "parameters"]

SHARED_BUDGET = 48 * 1024
"""Bytes of shared memory of a block that need no permission of the driver, which a runtime would have to ask for."""

_ENTRY = re.compile(r"(\.visible \.entry (\w+)\()(.*?)(\n?\))", re.DOTALL)


def parameters(ptx: str) -> list[str]:
    """Declarations of the entry's parameters, such as ".param .u32 f_param_3", in order."""
    entry = _ENTRY.search(ptx)
    if entry is None:
        raise ValueError("PTX without an entry")
    return [line.strip() for line in entry[3].split(",") if line.strip()]


def only_parameters(ptx: str, count: int) -> str:
    """The PTX with its first `count` parameters alone.

    The Triton language adds two pointers to scratch memory of its own. TensorRT gives none, and the driver would read
    behind the end of its argument list.

    Raises:
        ValueError: the code uses what would be taken away.
    """
    declared = parameters(ptx)
    for line in declared[count:]:
        name = line.split()[-1]
        if len(re.findall(rf"\b{name}\b", ptx)) > 1:
            raise ValueError(f"the kernel needs scratch memory ({name}), which TensorRT does not give")
    kept = ",\n".join(f"\t{line}" for line in declared[:count])
    return _ENTRY.sub(lambda entry: f"{entry[1]}\n{kept}\n)", ptx, count=1)


@dataclass(frozen=True)
class Assembled:
    """Statistics of assembled PTX.

    Attributes:
        registers: registers per thread.
        spilled_bytes: stores and loads of registers that did not fit.
        static_shared_bytes: shared memory that the code declares itself.
        parameter_bytes: size of each parameter, by its place, as the machine code has it.
    """

    registers: int
    spilled_bytes: int
    static_shared_bytes: int
    parameter_bytes: tuple[int, ...]


def assemble(ptx: str, capability: int) -> Assembled:
    """Assemble with the ptxas that comes with the Triton language, and disassemble the kernel's parameter list.

    Raises:
        ValueError: ptxas refuses the code; has what it says.
    """
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.knobs import nvidia

    match = re.search(r"\.target (\w+)", ptx)
    target = match[1] if match else f"sm_{capability}"
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        text, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        text.write_text(ptx)
        said = _run([get_ptxas(capability).path, "-v", f"--gpu-name={target}", str(text), "-o", str(cubin)])
        listed = _run([nvidia.cuobjdump.path, "-elf", str(cubin)])
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    static = re.search(r"(\d+) bytes smem", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return Assembled(
        int(registers[1]), sum(map(int, spills)), int(static[1]) if static else 0, _parameter_bytes(listed)
    )


def _parameter_bytes(listed: str) -> tuple[int, ...]:
    """Sizes from the attributes EIATTR_KPARAM_INFO, which cuobjdump lists last parameter first."""
    sizes = re.findall(
        r"EIATTR_KPARAM_INFO.*?Ordinal\s*:\s*(0x[0-9a-f]+).*?Size\s*:\s*(0x[0-9a-f]+)", listed, re.DOTALL
    )
    return tuple(size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in sizes))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{Path(command[0]).name}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr
