"""Run a kernel on torch tensors: compiled as for TensorRT on a GPU, interpreted (TRITON_INTERPRET=1) on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from trimtab.plugins.dialect import Form, Value
from trimtab.plugins.gpu.compile import compile_kernel
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile
from trimtab.plugins.gpu.loaded import Loaded

__all__ = ["form_of", "prepared"]

_KINDS = {
    torch.float32: "tensor(float)",
    torch.float16: "tensor(float16)",
    torch.bfloat16: "tensor(bfloat16)",
    torch.int8: "tensor(int8)",
    torch.uint8: "tensor(uint8)",
    torch.int32: "tensor(int32)",
}


def form_of(kernel: GpuKernel, inputs: Mapping[str, torch.Tensor], attributes: Mapping[str, Value]) -> Form:
    """The form of a call: types of what is given, and all attributes."""
    given = {i.name: _KINDS[inputs[i.name].dtype] for i in kernel.op.inputs if i.name in inputs}
    return Form(given, {a.name: attributes.get(a.name, a.default) for a in kernel.op.attributes})


def prepared(
    kernel: GpuKernel, inputs: Mapping[str, torch.Tensor], attributes: Mapping[str, Value], tile: Tile | None = None
) -> tuple[Callable[[], object], torch.Tensor]:
    """What launches once, and the tensor that each launch fills.

    Args:
        inputs: by name, contiguous; those left out must be optional.
        attributes: those left out take their defaults.
        tile: by default the kernel's first.

    Raises:
        ValueError: there is no kernel for this form, or shapes do not tell that of the output.
    """
    form = form_of(kernel, inputs, attributes)
    shapes = {i.name: list(inputs[i.name].shape) if i.name in inputs else None for i in kernel.op.inputs}
    given = {name: shape for name, shape in shapes.items() if shape is not None}
    if (reason := kernel.refuses(form, given)) is not None:
        raise ValueError(f"{kernel.op.name}: {reason}")
    tile = tile or kernel.tiles(form, given)[0]
    (result,) = kernel.op.outputs
    shape = result.shape(shapes, form.attributes)
    if shape is None or not all(isinstance(size, int) for size in shape):
        raise ValueError(f"{kernel.op.name}: the shapes {given} do not tell that of the output")
    first = inputs[kernel.op.inputs[0].name]
    dtype = torch.int32 if result.follows is None else inputs[result.follows].dtype
    output = torch.empty([int(size) for size in shape if size is not None], dtype=dtype, device=first.device)
    sizes = kernel.measure(given | {result.name: list(output.shape)})
    constants = kernel.constants(form, given, tile)
    grid = kernel.grid(sizes, constants, tile)
    if first.is_cuda:
        return _on_gpu(kernel, form, inputs, given, sizes, tile, grid, output), output
    arguments = [inputs.get(i.name) for i in kernel.op.inputs]
    arguments += [*(sizes[name] for name in kernel.sizes), output]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return lambda: kernel.function[grid](*arguments, **constants, **options), output


def _on_gpu(
    kernel: GpuKernel, form: Form, inputs: Mapping[str, torch.Tensor], shapes: Shapes, sizes: Mapping[str, int],
    tile: Tile, grid: tuple[int, ...], output: torch.Tensor,
) -> Callable[[], object]:  # fmt: skip
    major, minor = torch.cuda.get_device_capability(output.device)
    kept = {name: tuple(shape) for name, shape in shapes.items()}
    key = (kernel.op.name, repr(form), repr(kernel.constants(form, kept, tile)), tile, 10 * major + minor)
    if key not in _LOADED:
        _LOADED[key] = Loaded(compile_kernel(kernel, form, kept, tile, 10 * major + minor))
    loaded = _LOADED[key]
    given = [inputs[i.name] for i in kernel.op.inputs if i.name in inputs]
    values = [sizes[name] for name in kernel.sizes]

    def run() -> None:  # holds the tensors, as the driver does not
        stream = torch.cuda.current_stream(output.device).cuda_stream
        loaded.launch(grid, [tensor.data_ptr() for tensor in given], values, output.data_ptr(), stream)

    return run


_LOADED: dict[tuple[object, ...], Loaded] = {}
