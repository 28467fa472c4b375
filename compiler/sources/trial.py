"""Reads a foreign ONNX file in a child process first, with limits of memory and time.

onnx's shape inference, constant folding and ONNX Runtime's checks have no limits. A graph that exhausts memory or
crashes one of them would end the compile. The compile itself checks a file as it is stored (`load_graph`), and does the
rest only after a child has done it.
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
"""Time limit of the child. The graphs of the largest models take about 10 s."""

_MEMORY = 4 << 30
"""Maximum bytes of the child's private memory, in addition to `_PER_BYTE` bytes for each byte of the file."""

_PER_BYTE = 4
_INLINE = 1 << 16  # maximum bytes of a weight that stays in the graph that ONNX Runtime checks
_INVALID = re.compile(r"\[(?:Shape|Type)InferenceError\]|Type Error:|This is an invalid model\.")
"""Messages of ONNX Runtime 1.31 for a graph that no runtime could run."""

_UNKNOWN_OP = re.compile("No Op registered for|is not a registered function/op")
"""What ONNX Runtime 1.31 says of an op that it lacks: another runtime may have it."""

_DONE = "read"  # file that the child creates at its end
_EXPORT = "export the model again; if its own tools run it, please report it"


def try_out(path: Path, origin: Path) -> None:
    """Read the ONNX file at `path` in a child, unless a child has read it before and it is unchanged.

    Args:
        origin: the path that the user gave, for messages.

    Raises:
        ModelError: the file is not well-formed, ONNX Runtime refuses it, or reading it exceeds a limit or crashes.
    """

    def read() -> tuple[list[Path], Callable[[], str]]:
        return external_files(load_graph(path)), lambda: in_child(path, origin)

    remembered(f"trial {onnx.__version__} {ort.__version__}", path, read)


def in_child(path: Path, origin: Path) -> str:
    """Read the file in a child. Returns `_DONE`, which `remembered` stores.

    Raises:
        ModelError: see `try_out`.
    """
    with temporary_folder("trial") as scratch:
        run_child(
            __name__, [str(path), str(scratch), str(_limit(path))], scratch,
            makes=_DONE, origin=origin, what="reading its graph", hint=_EXPORT, timeout_s=MAX_SECONDS,
        )  # fmt: skip
    return _DONE


def read_graph(path: Path) -> None:
    """Read and check the file, in the child.

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
    """Check types, shapes and ops of the file with ONNX Runtime, without the large weights.

    Ops that ONNX Runtime does not know or cannot run are no error, since another runtime may run them.

    Raises:
        ModelError: ONNX Runtime refuses the graph as invalid; gives its reason.
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
        if _INVALID.search(str(error)) and not _UNKNOWN_OP.search(str(error)):
            raise ModelError(
                f"ONNX Runtime refuses the model as invalid: {explain(error).words}", hint=_EXPORT
            ) from error


def without_weights(model: ModelProto) -> ModelProto | None:
    """Replace the large weights of `model` by inputs. None if a nested graph has weights in another file."""
    for tensor in list(model.graph.initializer):
        if tensor.data_location == TensorProto.EXTERNAL or byte_size(tensor) > _INLINE:
            is_input = any(each.name == tensor.name for each in model.graph.input)
            if not is_input:
                info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
                model.graph.input.append(info)
            model.graph.initializer.remove(tensor)
    external = onnx.external_data_helper._get_all_tensors(model)
    return None if any(tensor.data_location == TensorProto.EXTERNAL for tensor in external) else model


def _limit(path: Path) -> int:
    return _MEMORY + _PER_BYTE * path.stat().st_size


def main() -> int:
    path, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    with suppress(ImportError, OSError, ValueError):  # other operating systems, or a lower limit is already set
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
