"""config.pbtxt, written with Triton's own protobuf schema, which tritonclient contains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.passes.errors import BuildError, ModelError
from trimtab.passes.optional import import_optional

NAME = "config.pbtxt"
WARMUP = "warmup"
"""Subfolder of a model with the data of its warm-up."""

_TYPES = {
    "float64": "FP64", "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "object": "STRING",
}  # fmt: skip


def schema() -> Any:
    """Triton's protobuf module with `ModelConfig`.

    Raises:
        BuildError: tritonclient is not installed.
    """
    what = "Triton's configuration"
    return import_optional("tritonclient.grpc.model_config_pb2", BuildError, what=what, extra="serve")


def is_batched(tensors: Iterable[TensorInfo]) -> bool:
    """Whether all `tensors` have the same named first dimension, so that Triton may join requests along it."""
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
        inputs, outputs: tensors with their first dimension, which the configuration omits if `batch` is not 0.
        batch: maximum number of samples that Triton joins in one call; 0: it joins none, and shapes are complete.
        gpu: run the instances on the GPUs, one set on each; else on the CPU.
        instances: number of instances that run at the same time.
        optional: inputs that a request may omit.

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
        config.dynamic_batching.SetInParent()  # default options: waiting requests are joined, and none waits for more
    for key, value in (parameters or {}).items():
        config.parameters[key].string_value = value
    return config


def _describe(described: Any, tensor: TensorInfo, batched: bool) -> Any:
    pb = schema()
    if tensor.shape is None or tensor.dtype not in _TYPES:
        raise ModelError(
            f"{tensor.name!r} is {tensor.dtype} with the shape {tensor.shape}, and Triton has no such tensors",
            hint="compile a model whose inputs and outputs have shapes and plain types",
        )
    described.name = tensor.name
    described.data_type = getattr(pb, f"TYPE_{_TYPES[tensor.dtype]}")
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape[batched:]]
    described.dims.extend(dims or [1])
    if not dims:  # Triton has no shape without dimensions; the model still gets its own shape
        described.reshape.SetInParent()
    return described


def add_warmup(config: Any, folder: Path, inputs: Sequence[TensorInfo], shapes: Mapping[str, Sequence[int]]) -> None:
    """Let Triton run the model once before it is ready: on one sample, or if Triton joins none, with `shapes`.

    Args:
        folder: folder of the model; data is written below it.
        shapes: shape of every input, with its first dimension.
    """
    import numpy as np

    sample = config.model_warmup.add(name="one sample", batch_size=1 if config.max_batch_size else 0)
    for tensor, described in zip(inputs, config.input, strict=True):
        shape = list(shapes[tensor.name])[config.max_batch_size > 0 :]
        sample_input = sample.inputs[tensor.name]
        sample_input.data_type = described.data_type
        sample_input.dims.extend(shape or [1])
        if "mask" in tensor.name:  # with zeros only, some models divide by zero
            (folder / WARMUP).mkdir(exist_ok=True)
            np.ones(shape, tensor.dtype).tofile(folder / WARMUP / tensor.name)
            sample_input.input_data_file = tensor.name
        else:
            sample_input.zero_data = True


def write_config(config: Any, folder: Path) -> None:
    """Write `config.pbtxt`, after checking that Triton's parser reads the same configuration from it."""
    from google.protobuf import text_format

    text = text_format.MessageToString(config)
    assert text_format.Parse(text, schema().ModelConfig()) == config, "config.pbtxt reads as another configuration"
    (folder / NAME).write_text(text, encoding="utf-8")
