"""Torch module → Source, exported in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.compiler.cache import entry, part
from trimtab.compiler.sources.source import Source
from trimtab.passes.errors import ModelError
from trimtab.passes.hashing import hash_bytes, hash_file
from trimtab.passes.optional import require_packages

if TYPE_CHECKING:
    import torch


def from_torch(
    module: torch.nn.Module,
    args: Sequence[Any],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Source:
    """Export `module` to ONNX as it computes in eval mode.

    Args:
        args, kwargs: example inputs for the module's forward. A dynamic dimension needs a size of 2 or more here, since
            torch treats 0 and 1 as constants.
        dynamic_shapes: the dynamic dimensions and their names, in the structure of `args`:
            `({0: "batch", 1: "tokens"}, {0: "batch", 1: "tokens"})`. Without it, all shapes are fixed to the examples'.
        name: name of the module in messages; by default its class.

    Raises:
        ModelError: torch is missing or cannot export the module; says why.
    """
    require_packages(("torch", "onnxscript"), ModelError, what="reading a torch module", extra="huggingface")
    from trimtab.compiler.sources.torch_export import export_module

    with part("sources") as exported:
        exported.mkdir()
        export_module(
            module, args, exported / "model.onnx", kwargs=kwargs, dynamic_shapes=dynamic_shapes,
            input_names=input_names, output_names=output_names,
        )  # fmt: skip
        # The entry is named by a hash of its content, so exporting a module again adds no entry to the cache.
        digest = hash_bytes(*(f"{path.name} {hash_file(path)}" for path in sorted(exported.iterdir())))
        folder = entry("sources", f"torch-{digest[:32]}", exported.rename)
    return Source(name or type(module).__name__, folder / "model.onnx", None, None, None, "torch")
