"""config.pbtxt, through Triton's own protobuf schema, which tritonclient carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.passes.errors import BuildError, ModelError
from trimtab.passes.optional import import_optional

NAME = "config.pbtxt"
WARMUP = "warmup"
"""Folder of a model for the data of its warm-up."""

_TYPES = {
    "float64": "FP64", "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bytes": "STRING",
}  # fmt: skip


def schema() -> Any:
    """Triton's module of `ModelConfig`.

    Raises:
        BuildError: tritonclient is not installed.
    """
    what = "Triton's configuration"
    return import_optional("tritonclient.grpc.model_config_pb2", BuildError, what=what, extra="serve")


def is_batched(tensors: Iterable[TensorInfo]) -> bool:
    """Whether one named dimension is the first of each of `tensors`, so that Triton may join requests along it."""
    firsts = {tensor.shape[0] if tensor.shape else None for tensor in tensors}
    return len(firsts) == 1 and isinstance(firsts.pop(), str)


def model_config(
    name: str,
    backend: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    *,
    batch: int,
    gpu: bool = False,
    instances: int = 1,
    optional: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
) -> Any:
    """The `ModelConfig` of one model.

    Args:
        inputs, outputs: with their first dimension, which is left out where `batch` is not 0.
        batch: the most samples that Triton joins in one call; 0: it joins none, and shapes are whole.
        gpu: its instances lie on the GPUs, one set on each, else on the CPU.
        instances: that run at the same time.
        optional: inputs that a request may leave out.

    Raises:
        ModelError: a tensor has no shape, or a type that Triton does not have.
    """
    pb = schema()
    config = pb.ModelConfig(name=name, backend=backend, max_batch_size=batch)
    for tensor in inputs:
        config.input.append(_describe(pb.ModelInput(optional=tensor.name in optional), tensor, batch > 0))
    for tensor in outputs:
        config.output.append(_describe(pb.ModelOutput(), tensor, batch > 0))
    kind = pb.ModelInstanceGroup.KIND_GPU if gpu else pb.ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=instances, kind=kind)
    config.version_policy.latest.num_versions = 1
    if batch:
        config.dynamic_batching.SetInParent()  # as it is by default: what waits is joined, and nothing waits for more
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    return config


def _describe(described: Any, tensor: TensorInfo, batched: bool) -> Any:
    pb = schema()
    if tensor.shape is None or tensor.dtype not in _TYPES:
        raise ModelError(
            f"{tensor.name!r} is {tensor.dtype} of the shape {tensor.shape}, and Triton has no such tensors",
            hint="compile a model whose inputs and outputs have shapes and plain types",
        )
    described.name = tensor.name
    described.data_type = getattr(pb, f"TYPE_{_TYPES[tensor.dtype]}")
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape[batched:]]
    described.dims.extend(dims or [1])
    if not dims:  # Triton has no shape without dimensions; the model still sees the shape it has
        described.reshape.SetInParent()
    return described


def add_warmup(config: Any, folder: Path, inputs: Sequence[TensorInfo], shapes: Mapping[str, Sequence[int]]) -> None:
    """Let Triton run the model once before it counts as ready: on one sample, or where it joins none, as `shapes` say.

    Args:
        folder: of the model; data is written below it.
        shapes: of every input, with its first dimension.
    """
    import numpy as np

    sample = config.model_warmup.add(name="one sample", batch_size=1 if config.max_batch_size else 0)
    for tensor, described in zip(inputs, config.input, strict=True):
        shape = list(shapes[tensor.name])[config.max_batch_size > 0 :]
        given = sample.inputs[tensor.name]
        given.data_type = described.data_type
        given.dims.extend(shape or [1])
        if "mask" in tensor.name:  # without a single 1, some models divide by zero
            (folder / WARMUP).mkdir(exist_ok=True)
            np.ones(shape, tensor.dtype).tofile(folder / WARMUP / tensor.name)
            given.input_data_file = tensor.name
        else:
            given.zero_data = True


def write_config(config: Any, folder: Path) -> None:
    """Write `config.pbtxt`, and see that Triton's parser reads the same from it."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    assert text_format.Parse(text, schema().ModelConfig()) == config, "config.pbtxt says something else"
    (folder / NAME).write_text(text, encoding="utf-8")
