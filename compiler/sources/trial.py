"""A foreign ONNX file is first read in a child process, with limits of memory and time.

onnx's shape inference, its constant folding and ONNX Runtime's own checks have no limits, and a graph that takes all
memory, or crashes one of them, would take the compile with it. What a child has come through, the compile repeats.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from trimtab.compiler.caching.remembered import remembered
from trimtab.compiler.sources.child import report, run_child
from trimtab.passes.errors import ModelError
from trimtab.passes.graph.io import external_files, load_graph
from trimtab.passes.graph.weights import byte_size
from trimtab.passes.ort_errors import exceptions, explain
from trimtab.passes.temporary import temporary_folder

MAX_SECONDS = 300.0
"""Of the child. The graphs of the largest models take about 10."""

_MEMORY = 4 << 30
"""Bytes of private memory that the child may have, and `_PER_BYTE` more for each byte of the file."""

_PER_BYTE = 4
_INLINE = 1 << 16  # bytes up to which weights stay in the graph that ONNX Runtime checks
_INVALID = re.compile(r"\[(?:Shape|Type)InferenceError\]|Type Error:|This is an invalid model\.")
"""What ONNX Runtime 1.31 says of a graph that no runtime could run."""

_DONE = "read"  # file that the child leaves
_EXPORT = "export the model again; if its own tools run it, please report it"


def try_out(path: Path, origin: Path) -> None:
    """Read the ONNX file at `path` in a child, unless it was before and has not changed since.

    Args:
        origin: what the user gave, for messages.

    Raises:
        ModelError: it is not well-formed, ONNX Runtime refuses it as invalid, or reading it passes a limit or crashes.
    """

    def read() -> tuple[list[Path], Callable[[], str]]:
        return external_files(load_graph(path)), lambda: in_child(path, origin)

    remembered(f"trial {onnx.__version__} {ort.__version__}", path, read)


def in_child(path: Path, origin: Path) -> str:
    """Read the file in a child; the returned word says that it was.

    Raises:
        ModelError: as `try_out`.
    """
    with temporary_folder("trial") as scratch:
        run_child(
            __name__, [str(path), str(scratch), str(_limit(path))], scratch,
            makes=_DONE, origin=origin, what="reading its graph", hint=_EXPORT, timeout_s=MAX_SECONDS,
        )  # fmt: skip
    return _DONE


def read_graph(path: Path) -> None:
    """What the child does.

    Raises:
        ModelError: the file is not well-formed, or not valid.
    """
    from trimtab.passes.canonicalize.fold import fold_constants, hoist_constants
    from trimtab.passes.canonicalize.shapes import infer_shapes

    graph = load_graph(path)
    check_runtime(path)
    hoist_constants(graph)
    fold_constants(graph)
    infer_shapes(graph)


def check_runtime(path: Path) -> None:
    """Have ONNX Runtime check types, shapes and ops of the file, without its large weights.

    What ONNX Runtime does not know or cannot run is no fault of the file: another runtime may.

    Raises:
        ModelError: it refuses the graph as invalid; with its reason.
    """
    model = without_weights(onnx.load(str(path), format="protobuf", load_external_data=False))
    if model is None:
        return
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except exceptions() as error:
        if _INVALID.search(str(error)):
            raise ModelError(
                f"ONNX Runtime refuses the model as invalid: {explain(error).words}", hint=_EXPORT
            ) from error


def without_weights(model: ModelProto) -> ModelProto | None:
    """`model` with inputs in place of its large weights; None where a graph inside has weights in another file."""
    for tensor in list(model.graph.initializer):
        if tensor.data_location == TensorProto.EXTERNAL or byte_size(tensor) > _INLINE:
            known = any(each.name == tensor.name for each in model.graph.input)
            if not known:
                info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                model.graph.input.append(info)
            model.graph.initializer.remove(tensor)
    external = onnx.external_data_helper._get_all_tensors(model)
    return None if any(tensor.data_location == TensorProto.EXTERNAL for tensor in external) else model


def _limit(path: Path) -> int:
    return _MEMORY + _PER_BYTE * path.stat().st_size


def main() -> int:
    path, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with suppress(ImportError, OSError, ValueError):  # another system, or a lower limit holds already
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def work() -> None:
        try:
            read_graph(path)
        except MemoryError as error:
            raise ModelError(f"reading its graph takes more than {limit >> 20} MB of memory", hint=_EXPORT) from error
        (out / _DONE).touch()

    return report(out, work)


if __name__ == "__main__":
    sys.exit(main())
