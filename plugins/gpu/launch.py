"""Run a kernel on torch tensors: compiled as for TensorRT on a GPU, interpreted (TRITON_INTERPRET=1) on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from trimtab.plugins.dialect import Form, Value
from trimtab.plugins.gpu.compile import compile_kernel
from trimtab.plugins.gpu.kernel import GpuKernel, Shapes, Tile
from trimtab.plugins.gpu.loaded import Loaded
from trimtab.plugins.sizes import Counted

__all__ = ["form_of", "prepared"]

_KINDS = {
    torch.float32: "tensor(float)",
    torch.float16: "tensor(float16)",
    torch.bfloat16: "tensor(bfloat16)",
    torch.int8: "tensor(int8)",
    torch.uint8: "tensor(uint8)",
    torch.int32: "tensor(int32)",
}
_DTYPES = {name: dtype for dtype, name in _KINDS.items()}


def form_of(kernel: GpuKernel, inputs: Mapping[str, torch.Tensor], attributes: Mapping[str, Value]) -> Form:
    """The form of a call: types of what is given, and all attributes."""
    given = {i.name: _KINDS[inputs[i.name].dtype] for i in kernel.op.inputs if i.name in inputs}
    return Form(given, {a.name: attributes.get(a.name, a.default) for a in kernel.op.attributes})


def prepared(
    kernel: GpuKernel,
    inputs: Mapping[str, torch.Tensor],
    attributes: Mapping[str, Value],
    tile: Tile | None = None,
    unnamed: Collection[str] = (),
) -> tuple[Callable[[], object], tuple[torch.Tensor, ...]]:
    """What launches once, and the tensors that each launch fills: outputs, then the sizes that it counts.

    Args:
        inputs: by name, contiguous; those left out must be optional.
        attributes: those left out take their defaults.
        tile: by default the kernel's first.
        unnamed: optional outputs that are left out.

    Raises:
        ValueError: there is no kernel for this form, or shapes do not tell those of the outputs.
    """
    form = replace(form_of(kernel, inputs, attributes), unnamed=frozenset(unnamed))
    shapes = {i.name: list(inputs[i.name].shape) if i.name in inputs else None for i in kernel.op.inputs}
    given = {name: shape for name, shape in shapes.items() if shape is not None}
    if (reason := kernel.refuses(form, given)) is not None:
        raise ValueError(f"{kernel.op.name}: {reason}")
    tile = tile or kernel.tiles(form, given)[0]
    first = inputs[kernel.op.inputs[0].name]
    outputs = _outputs(kernel, form, shapes, first.device)
    sizes = kernel.measure(given | {name: list(tensor.shape) for name, tensor in outputs.items()})
    constants = kernel.constants(form, given, tile)
    grid = kernel.grid(sizes, constants, tile)
    results = tuple(outputs.values())
    if first.is_cuda:
        return _on_gpu(kernel, form, inputs, given, sizes, tile, grid, results), results
    arguments = [inputs.get(i.name) for i in kernel.op.inputs]
    arguments += [sizes[name] for name in kernel.sizes]
    arguments += [outputs.get(name) for name in (*(o.name for o in kernel.op.outputs), *kernel.counted)]
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return lambda: kernel.function[grid](*arguments, **constants, **options), results


def _outputs(
    kernel: GpuKernel, form: Form, shapes: Mapping[str, list[int] | None], device: torch.device
) -> dict[str, torch.Tensor]:
    """Empty tensors for the outputs, as large as they can be, and for the sizes that are counted."""
    inferred = kernel.op.infer(shapes, form.attributes)
    outputs = {}
    for o in kernel.op.named(form):
        shape = inferred[o.name]
        known = [size.at_most if isinstance(size, Counted) else size for size in shape or ()]
        sizes = [size for size in known if isinstance(size, int)]
        if shape is None or len(sizes) < len(shape):
            raise ValueError(f"{kernel.op.name}: the shapes {shapes} do not tell that of {o.name}")
        outputs[o.name] = torch.empty(sizes, dtype=_DTYPES[o.type_in(form.given)], device=device)
    return outputs | {name: torch.empty([], dtype=torch.int32, device=device) for name in kernel.counted}


def _on_gpu(
    kernel: GpuKernel, form: Form, inputs: Mapping[str, torch.Tensor], shapes: Shapes, sizes: Mapping[str, int],
    tile: Tile, grid: tuple[int, ...], outputs: Sequence[torch.Tensor],
) -> Callable[[], object]:  # fmt: skip
    major, minor = torch.cuda.get_device_capability(outputs[0].device)
    kept = {name: tuple(shape) for name, shape in shapes.items()}
    key = (kernel.op.name, repr(form), repr(kernel.constants(form, kept, tile)), tile, 10 * major + minor)
    if key not in _LOADED:
        _LOADED[key] = Loaded(compile_kernel(kernel, form, kept, tile, 10 * major + minor))
    loaded = _LOADED[key]
    given = [inputs[i.name] for i in kernel.op.inputs if i.name in inputs]
    values = [sizes[name] for name in kernel.sizes]

    def run() -> None:  # holds the tensors, as the driver does not
        stream = torch.cuda.current_stream(outputs[0].device).cuda_stream
        loaded.launch(grid, [t.data_ptr() for t in given], values, [t.data_ptr() for t in outputs], stream)

    return run


_LOADED: dict[tuple[object, ...], Loaded] = {}
