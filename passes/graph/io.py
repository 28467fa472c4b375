"""ONNX file → Graph → ONNX file, without loading the weights that nothing touches."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.weights import ExternalValues, fingerprint

_INLINE = 1024  # bytes up to which a tensor stays in the .onnx file itself: shapes and scalars, which shape inference reads
_ALIGN = 4096  # of each tensor in the data file, so that a runtime may map it


def load_graph(path: Path | str) -> gs.Graph:
    """Read an ONNX file. Weights in external data stay there; their presence and size are checked now.

    Raises:
        ModelError: not an ONNX file, truncated, or external data missing, too short or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    hint = "export the model again"
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not an ONNX file, or truncated ({error})", hint=hint) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model: it has no nodes or no opset", hint=hint)
    try:
        graph = gs.import_onnx(model)
    except Exception as error:  # graphsurgeon raises what its parser trips over: keys, indices, types
        raise ModelError(f"{path}: not a well-formed ONNX graph ({error})", hint=hint) from error
    attach(graph, path.parent)
    return graph


def attach(graph: gs.Graph, base: Path) -> None:
    """Give every constant with external data (subgraphs too) values that read from below `base`."""
    for tensor in graph.tensors(check_duplicates=False).values():
        held = getattr(tensor, "_values", None)
        if isinstance(held, LazyValues) and held.tensor.data_location == TensorProto.EXTERNAL:
            tensor._values = ExternalValues(held.tensor, base)
    for node in graph.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                attach(value, base)


def save_graph(graph: gs.Graph, path: Path | str, *, external: bool = True) -> None:
    """Write `graph` to `path`, with its weights in `<name>.data` beside it (regular file, relative name).

    Args:
        graph: is left as it was, except for topological sorting.
        path: where the .onnx file goes; its folder must exist.
        external: False puts all weights into the one file, which protobuf limits to 2 GB.
    """
    path = Path(path)
    graph.toposort()
    model = gs.export_onnx(graph)
    held = {name: t._values for name, t in graph.tensors().items() if isinstance(t, gs.Constant)}
    data_name = path.name + ".data"
    if not external:
        for tensor in model.graph.initializer:
            _inline(tensor, held.get(tensor.name))
    elif any(_size(t, held.get(t.name)) > _INLINE for t in model.graph.initializer):
        with open(path.parent / data_name, "wb") as file:
            for tensor in model.graph.initializer:
                source = held.get(tensor.name)
                size = _size(tensor, source)
                if size <= _INLINE:
                    _inline(tensor, source)
                    continue
                file.write(b"\0" * (-file.tell() % _ALIGN))
                start = file.tell()
                if isinstance(source, ExternalValues):
                    source.copy_to(file)
                else:
                    file.write(_raw(tensor))
                _point(tensor, data_name, start, size)
    path.write_bytes(model.SerializeToString())


def _raw(tensor: TensorProto) -> bytes:
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data


def _size(tensor: TensorProto, source: object) -> int:
    return source.bytes if isinstance(source, ExternalValues) else len(_raw(tensor))


def _inline(tensor: TensorProto, source: object) -> None:
    if isinstance(source, ExternalValues):
        clear = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        clear.raw_data = source.load().tobytes()
        tensor.CopyFrom(clear)


def _point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make `tensor` refer to bytes of an external file. Built anew: the proto may be shared with the graph."""
    clear = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    clear.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        clear.external_data.add(key=key, value=str(value))
    tensor.CopyFrom(clear)


def model_fingerprint(graph: gs.Graph) -> str:
    """A hash of all weights, whatever their order and names: the same for a renamed graph, another for another model."""
    prints = sorted(
        fingerprint(t) for t in graph.tensors().values() if isinstance(t, gs.Constant) and _count(t.shape) >= 64
    )
    return hashlib.sha256("".join(prints).encode()).hexdigest()


def _count(shape: object) -> int:
    count = 1
    for dim in shape or ():  # type: ignore[attr-defined]
        count *= int(dim)
    return count
