"""Calibration: run the exported graph on data and store in the Profile what passes need.

ONNX Runtime runs the graph; the tensors that meters read, such as the inputs and the hidden activations of FFNs, are
its outputs. So calibration works for every source, and does not need torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.counts import check_count
from trimtab.compiler.data import Dataset, batches
from trimtab.compiler.fixed_shapes import in_whole_batches
from trimtab.compiler.memory import give_back, resident_bytes
from trimtab.compiler.meters import Meter, meters_for
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.passes.anatomy import Anatomy, find_anatomy
from trimtab.passes.canonicalize.repack import repack
from trimtab.passes.graph import is_external, save_graph, stored_bytes
from trimtab.passes.graph.positions import find_positions
from trimtab.passes.graph.weights import ExternalValues
from trimtab.passes.needs import DEFAULT, Need
from trimtab.passes.profile import Profile, ProfileInfo
from trimtab.passes.temporary import temporary_folder

if TYPE_CHECKING:
    from trimtab.compiler.sources import Source

log = logging.getLogger(__name__)

_INLINE_LIMIT = 1 << 24  # largest size of inline weights, in bytes, at which the runtime gets the graph in memory
_ROOM = 1 << 24  # bytes of activations that one run returns, however deep the model is


def calibrate(
    source: Source,
    data: Dataset,
    *,
    samples: int = 512,
    batch_size: int = 16,
    max_tokens: int = 128,
    states: int = 4096,
    progress: Callable[[str, int, int], None] | None = None,
    seed: int = 0,
    needs: Collection[Need] = DEFAULT,
) -> Profile:
    """Measure the Profile of a model on data.

    Memory does not grow with the number of samples. Padding (0 in `attention_mask`) is not counted.

    Args:
        samples: number of samples to use, chosen at random.
        max_tokens: texts are cut to this many tokens.
        states: number of rows of each FFN's input to keep, chosen at random; the tokens are the same in every layer.
        progress: called with (what, done, total).
        needs: what to measure.

    Raises:
        ModelError: the model has no part that `needs` measures, does not run, or has activations that are not finite.
        DataError: the data do not fit the model's inputs.
        InputError: a number of samples, of tokens or of rows is not an integer of at least 1.
    """
    wanted = {"samples": samples, "batch_size": batch_size, "max_tokens": max_tokens, "states": states}
    for name, number in wanted.items():
        check_count(name, number)
    before = resident_bytes()
    graph = source.graph()
    anatomy, positions = find_anatomy(graph), find_positions(graph)
    meters = meters_for(needs, anatomy, source.origin, states, seed)
    inputs = [gs.Variable(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.inputs]
    run = in_whole_batches(_runner(graph, anatomy, meters, source.onnx.parent).run, inputs)
    for meter in meters:
        meter.tensors = ()
    del graph, anatomy
    give_back(before)  # otherwise the weights stay in memory until the next garbage collection

    used, tokens, total = 0, 0, min(samples, data.count)
    for batch in batches(data, source, batch_size, max_tokens, samples, seed=seed, inputs=inputs, positions=positions):
        mask = batch.get("attention_mask")
        length = 0 if mask is None else mask.shape[-1]
        tokens_per_run = _ROOM // max(sum(meter.token_bytes(length) for meter in meters), 1)
        for feeds in _split(batch, tokens_per_run):
            values = {**feeds, **run({tensor.name: feeds[tensor.name] for tensor in inputs})}
            counts = [meter.add(values, feeds.get("attention_mask")) for meter in meters]
            tokens += counts[0] if counts else 0
        used += len(batch[inputs[0].name])
        if progress is not None:
            progress("calibrate", used, total)
    log.info("calibrated %d parts on %d samples, %d tokens", len(meters), used, tokens)
    info = ProfileInfo(
        model=source.fingerprint,
        data=data.sha256,
        samples=used,
        tokens=tokens,
        versions={name: version(name) for name in ("trimtab", "onnxruntime", "numpy")},
    )
    profile = Profile(info)
    for meter in meters:
        meter.store(profile)
    return profile


def _split(feeds: dict[str, np.ndarray], tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Parts of the batch with at most `tokens` tokens, but at least one sample; without a mask, the whole batch."""
    mask = feeds.get("attention_mask")
    samples = len(next(iter(feeds.values())))
    step = samples if mask is None else max(1, tokens // mask.shape[-1])
    for start in range(0, samples, step):
        yield {name: array[start : start + step] for name, array in feeds.items()}


def _runner(graph: gs.Graph, anatomy: Anatomy, meters: Sequence[Meter], base: Path) -> OnnxRuntimeRunner:
    """A session of `graph`, reduced to what `meters` read.

    Weights in external data are read from their files, below `base`. Large inline weights are written to a temporary
    file first: a graph in memory would exist three times, in Python, in protobuf and in the runtime.
    """
    readers = [linear for ffn in anatomy.ffns for linear in ffn.linears]
    readers += anatomy.head.linears if anatomy.head is not None else ()
    types = {id(m.x): m.weight.dtype if m.quantized is None else np.dtype(np.float32) for m in readers}
    read_tensors = {}
    for tensor in (tensor for meter in meters for tensor in meter.tensors):
        if tensor.dtype is None:  # exporters need not annotate inner tensors
            tensor.dtype = types.get(id(tensor), np.dtype(np.float32))
        read_tensors[tensor.name] = tensor
    graph.outputs = [
        tensor for tensor in read_tensors.values() if tensor.inputs
    ]  # an input of the graph is in the feeds
    graph.cleanup(remove_unused_graph_inputs=False)
    repack(graph)
    options = session_options()
    options.enable_cpu_mem_arena = False  # the arena would never free the memory of the largest batch
    graphs = (graph, *graph.subgraphs(recursive=True))
    weights = [tensor for part in graphs for tensor in part.tensors().values() if isinstance(tensor, gs.Constant)]
    if sum(stored_bytes(weight) for weight in weights if not is_external(weight)) <= _INLINE_LIMIT:
        folder = str(_data_folder(weights, base.resolve()))
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return OnnxRuntimeRunner(gs.export_onnx(graph).SerializeToString(), options)
    with temporary_folder("calibrate") as scratch:
        save_graph(graph, scratch / "model.onnx")
        return OnnxRuntimeRunner(scratch / "model.onnx", options)


def _data_folder(weights: Sequence[gs.Constant], base: Path) -> Path:
    """The folder that contains all external data of `weights`; their locations become relative to it.

    ONNX Runtime reads no file outside the folder, not even through a link in it, such as those of a hub's cache.
    """
    external = [weight._values for weight in weights if isinstance(weight._values, ExternalValues)]
    folder = Path(os.path.commonpath([base, *(values.path.parent for values in external)]))
    for values in external:
        place = next(entry for entry in values.tensor.external_data if entry.key == "location")
        place.value = values.path.relative_to(folder).as_posix()
    return folder
