"""Loads and saves ONNX files, without loading weights that no pass reads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from trimtab.passes.errors import ModelError
from trimtab.passes.graph.importable import ModelInfo, make_importable, shorten_domain
from trimtab.passes.graph.order import topological
from trimtab.passes.graph.weights import ExternalValues, append, fingerprint, is_packed, stored_bytes
from trimtab.passes.graph.wellformed import check_model
from trimtab.passes.hashing import hash_bytes
from trimtab.passes.os_errors import check_readable, no_file

G_LOGGER.severity = G_LOGGER.ERROR  # its warnings about types that numpy lacks go to stdout, which carries our results
_INLINE = 1024  # bytes up to which a tensor stays in the .onnx file: shape inference reads shapes and scalars there
_HASHING = 4  # weights hashed at a time; each thread uses 1 MB
_IR_VERSION = 10  # of new graphs: the first version with int4
_CONSTANTS_ARE_NO_INPUTS = 4  # in files of older versions, each constant is an input too


def load_graph(path: Path | str) -> gs.Graph:
    """Read an ONNX file. Weights in external data are not loaded, but their presence and size are checked.

    Raises:
        ModelError: the file is not ONNX, truncated or not well-formed (`wellformed`), or its external data are missing,
            too short or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise no_file(path, ModelError, hint="give an ONNX file")
    check_readable(path, ModelError)
    hint = "export the model again"
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not an ONNX file, or truncated ({error})", hint=hint) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path}: not an ONNX model: it has no nodes or no opset", hint=hint)
    shorten_domain(model)
    check_model(model, str(path))
    make_importable(model, str(path))
    try:
        graph = gs.import_onnx(model)
    except Exception as error:  # graphsurgeon's parser raises errors of many types
        raise ModelError(f"{path}: not a well-formed ONNX graph ({error})", hint=hint) from error
    attach(graph, path.parent)
    graph.model_info = ModelInfo.of(model)
    return graph


def attach(graph: gs.Graph, base: Path) -> None:
    """Give every constant with external data (subgraphs too) values that are read from `base`."""
    for constant in _constants(graph):
        stored = constant._values
        if isinstance(stored, LazyValues) and stored.tensor.data_location == TensorProto.EXTERNAL:
            constant._values = ExternalValues(stored.tensor, base)
            constant.data_location = None  # the exporter would write it even with new values


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Every constant of `graph` and its subgraphs; a constant that several graphs use comes several times."""
    yield from (tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant))
    for subgraph in graph.subgraphs():
        yield from _constants(subgraph)


class WeightFile:
    """A data file that the graphs of one folder share; a weight of several graphs is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115  (closed by __exit__)
        self._written: dict[int, tuple[object, LazyValues]] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def move(self, constant: gs.Constant) -> LazyValues:
        """The reference to the constant's values, for a model file; values not yet in the data file are written."""
        stored = constant._values
        if id(stored) not in self._written:  # storing the object keeps its id from being reused
            self._written[id(stored)] = stored, append(constant, self._file, self.path.name)
        reference = TensorProto()
        reference.CopyFrom(self._written[id(stored)][1].tensor)
        reference.name = constant.name
        return LazyValues(reference)


def save_graph(graph: gs.Graph, path: Path | str, *, external: bool = True, weights: WeightFile | None = None) -> None:
    """Write `graph` to `path`, with its weights in `<name>.data` beside it (regular file, relative name).

    Args:
        graph: does not change, except that its nodes are sorted topologically.
        path: the .onnx file to write; its folder must exist.
        external: False stores all weights in the .onnx file, which protobuf limits to 2 GB.
        weights: a data file in the same folder to store the weights in instead.

    Raises:
        ModelError: the graph reads its weights from the data file that would be overwritten.
    """
    path = Path(path)
    data = path.with_name(path.name + ".data") if weights is None else weights.path
    graph.nodes = topological(graph)
    constants = list({id(constant): constant for constant in _constants(graph)}.values())
    stored = [constant._values for constant in constants]
    if any(isinstance(values, ExternalValues) and values.path == data.resolve() for values in stored):
        raise ModelError(
            f"{path}: the weights of this graph are stored in {data.name}", hint="save it under another name"
        )
    large = [constant for constant in constants if external and stored_bytes(constant) > _INLINE]
    try:
        if weights is not None:
            for constant in large:
                constant._values = weights.move(constant)
        elif large:
            with open(data, "wb") as file:
                for constant in large:
                    constant._values = append(constant, file, data.name)
        for constant in constants:
            if isinstance(constant._values, ExternalValues):
                constant._values = LazyValues(constant._values.inline())
            elif isinstance(constant._values, np.ndarray) and is_packed(constant._values):  # graphsurgeon fails on them
                constant._values = LazyValues(numpy_helper.from_array(constant._values, constant.name))
        model = gs.export_onnx(graph)
    finally:
        for constant, values in zip(constants, stored, strict=True):
            constant._values = values
    model.ir_version = max(model.ir_version, _CONSTANTS_ARE_NO_INPUTS)
    if graph.ir_version is None:  # a new graph: graphsurgeon would set a version newer than runtimes support
        model.ir_version = max(_IR_VERSION, onnx.helper.find_min_ir_version_for(model.opset_import, True))
    info: ModelInfo | None = vars(graph).get("model_info")  # getattr would return an op
    if info is not None:
        info.write(model)
    path.write_bytes(model.SerializeToString())


def model_fingerprint(graph: gs.Graph) -> str:
    """A hash of every byte of all constants, in the order in which nodes use them. It does not depend on names.

    The order counts, because a model with two weights of one shape exchanged is another model.
    """
    constants = {id(constant): constant for constant in _constants(graph)}
    with ThreadPoolExecutor(_HASHING) as pool:
        return hash_bytes(*pool.map(fingerprint, constants.values()))


def external_files(graph: gs.Graph) -> list[Path]:
    """The data files of the constants of `graph`, under the graph's paths, which may be links."""
    stored = [constant._values for constant in _constants(graph)]
    return sorted({values.named for values in stored if isinstance(values, ExternalValues)})
