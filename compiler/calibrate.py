"""Calibration: run the exported graph on data, and keep what passes need to know of its FFNs.

The graph itself runs, in ONNX Runtime, with the inputs and the hidden activations of its FFNs as its outputs; so any
source will do, and torch is not needed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.compiler.data import Dataset, batches
from trimtab.compiler.phases import give_back, resident_bytes
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.passes.anatomy import FFN, Anatomy, find_anatomy
from trimtab.passes.canonicalize.repack import repack
from trimtab.passes.errors import ModelError
from trimtab.passes.graph import is_external, save_graph, stored_bytes
from trimtab.passes.graph.linear import Linear
from trimtab.passes.profile import FFNStats, Profile, ProfileInfo

if TYPE_CHECKING:
    from trimtab.compiler.sources import Source

log = logging.getLogger(__name__)

_INLINE_LIMIT = 1 << 24  # bytes of weights in the graph itself up to which it is handed to the runtime in memory
_ROOM = 1 << 24  # bytes of activations to take out of the runtime at a time, however deep the model is
_CHUNK = 256  # rows that are widened to float64 at a time


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
) -> Profile:
    """Measure the FFNs of a model on data.

    Memory does not grow with the number of samples. Padding (0 in `attention_mask`) counts for nothing.

    Args:
        samples: how many samples of the data to use, chosen at random.
        max_tokens: texts are cut to so many tokens.
        states: rows of each FFN's input to keep, chosen at random, of the same tokens in every layer.
        progress: called with (what, done, total).

    Raises:
        ModelError: no FFN was found, the model does not run, or its activations are not finite.
        DataError: the data do not fit the model's inputs.
    """
    before = resident_bytes()
    graph = source.graph()
    anatomy = find_anatomy(graph)
    ffns = anatomy.ffns
    if not ffns:
        raise ModelError(f"{source.origin}: no FFN found in it", hint="`trimtab inspect` tells what was not recognised")
    inputs = [gs.Variable(tensor.name, tensor.dtype, _shape(tensor, anatomy)) for tensor in graph.inputs]
    layers = [_Layer(ffn, states, seed) for ffn in ffns]
    head = anatomy.head.vocabulary if anatomy.head is not None else None
    head_x, head_states = (head.x.name, Reservoir(states, head.in_features, seed)) if head else (None, None)
    runner = _runner(graph, ffns, head, source.onnx.parent)
    del graph, anatomy, ffns, head
    give_back(before)  # or the weights that were read would stay until the next collection

    used, total = 0, min(samples, data.count)
    room = _ROOM // sum(layer.token_bytes for layer in layers)
    for batch in batches(data, source, batch_size, max_tokens, samples, seed=seed, inputs=inputs):
        for feeds in _split(batch, room):
            mask = feeds.get("attention_mask")
            keep = mask.reshape(-1) != 0 if mask is not None and mask.ndim == 2 else None
            found = feeds | runner.run({tensor.name: feeds[tensor.name] for tensor in inputs})
            for layer in layers:
                layer.add(found, keep)
            if head_x is not None and head_states is not None:
                rows = _rows(found[head_x], keep)
                _check_finite("head", rows)
                head_states.add(rows)
        used += len(batch[inputs[0].name])
        if progress is not None:
            progress("calibrate", used, total)
    log.info("calibrated %d layers on %d samples, %d tokens", len(layers), used, layers[0].tokens)
    info = ProfileInfo(
        model=source.fingerprint,
        data=data.sha256,
        samples=used,
        tokens=layers[0].tokens,
        versions={name: version(name) for name in ("trimtab", "onnxruntime", "numpy")},
    )
    profile = Profile(info)
    for layer in layers:
        profile.set_ffn(layer.number, layer.stats())
    if head_states is not None:
        profile.set_head(head_states.rows)
    return profile


class Reservoir:
    """A uniform random sample of all rows seen (Vitter 1985, algorithm R), many rows at a time.

    Reservoirs of one size and seed keep the rows of the same positions, however the rows come in batches.
    """

    def __init__(self, size: int, width: int, seed: int) -> None:
        self._rows = np.empty((size, width), np.float32)
        self._random = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows: np.ndarray) -> None:
        """Offer rows [n, width]."""
        size = len(self._rows)
        positions = np.arange(self.seen, self.seen + len(rows))
        slots = (self._random.random(len(rows)) * (positions + 1)).astype(np.int64)
        slots = np.where(positions < size, positions, slots)
        taken = slots < size
        self._rows[slots[taken]] = rows[taken]  # of rows for one slot numpy leaves the last, as algorithm R does
        self.seen += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """[min(seen, size), width], float32."""
        return self._rows[: self.seen]


class _Layer:
    """Running statistics of one FFN. They take the same room however many tokens are seen."""

    def __init__(self, ffn: FFN, states: int, seed: int) -> None:
        self.number, self.where = ffn.layer, ffn.where
        self.x, self.hidden = ffn.x.name, ffn.hidden.name
        self.token_bytes = 4 * (ffn.d_model + ffn.d_ff)
        self.sums = np.zeros((3, ffn.d_ff))  # of |h|, h, h²
        self.reservoir = Reservoir(states, ffn.d_model, seed)

    @property
    def tokens(self) -> int:
        return self.reservoir.seen

    def add(self, found: Mapping[str, np.ndarray], keep: np.ndarray | None) -> None:
        x, hidden = _rows(found[self.x], keep), _rows(found[self.hidden], keep)
        with np.errstate(invalid="ignore"):  # what is not finite is reported below
            for start in range(0, len(hidden), _CHUNK):
                h = hidden[start : start + _CHUNK].astype(np.float64)
                self.sums += np.abs(h).sum(0), h.sum(0), np.einsum("tj,tj->j", h, h)
        _check_finite(self.where, self.sums, x)
        self.reservoir.add(x)

    def stats(self) -> FFNStats:
        abs_sum, total, square_sum = self.sums
        return FFNStats(self.tokens, abs_sum, total, square_sum, self.reservoir.rows)


def _check_finite(where: str, *arrays: np.ndarray) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ModelError(
            f"{where}: its activations hold NaN or Inf on this data",
            hint="check the model's weights; a float16 model may overflow: export it in float32",
        )


def _shape(tensor: gs.Tensor, anatomy: Anatomy) -> list[int | str] | None:
    """The shape of an input. Some exporters leave a symbol for the head size of a decoder's cache."""
    sizes = {attention.head_dim for attention in anatomy.attentions}
    if tensor.name.startswith("past") and tensor.shape and isinstance(tensor.shape[-1], str) and len(sizes) == 1:
        return [*tensor.shape[:-1], sizes.pop() or tensor.shape[-1]]
    return tensor.shape


def _split(feeds: dict[str, np.ndarray], tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """The batch in parts of at most `tokens` tokens, or of one sample; whole, where tokens cannot be told."""
    mask = feeds.get("attention_mask")
    samples = len(next(iter(feeds.values())))
    step = samples if mask is None else max(1, tokens // mask.shape[-1])
    for start in range(0, samples, step):
        yield {name: array[start : start + step] for name, array in feeds.items()}


def _rows(array: np.ndarray, keep: np.ndarray | None) -> np.ndarray:
    """[batch, tokens, d] or [batch·tokens, d] → the rows to keep; all, where rows are not tokens (after pooling)."""
    flat = array.reshape(-1, array.shape[-1])
    return flat[keep] if keep is not None and len(keep) == len(flat) else flat


def _runner(graph: gs.Graph, ffns: tuple[FFN, ...], head: Linear | None, base: Path) -> OnnxRuntimeRunner:
    """A session of `graph`, cut down to what its FFNs' inputs and hidden activations, and the head's input, need.

    Weights in external data are read where they lie, below `base`. Others are written to a temporary file first: a
    graph in memory would be held by Python, by protobuf and by the runtime at once.
    """
    wanted = {}
    pairs = [pair for ffn in ffns for pair in ((ffn.x, ffn.up), (ffn.hidden, ffn.down))]
    for tensor, linear in (*pairs, *([(head.x, head)] if head else [])):
        if tensor.dtype is None:  # exporters need not annotate inner tensors
            tensor.dtype = linear.weight.dtype if linear.quantized is None else np.float32
        wanted[tensor.name] = tensor
    graph.outputs = [tensor for tensor in wanted.values() if tensor.inputs]  # an input of the graph is known anyway
    graph.cleanup(remove_unused_graph_inputs=False)
    repack(graph)
    options = session_options()
    options.enable_cpu_mem_arena = False  # the arena would keep the room of the largest batch for good
    weights = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    if sum(stored_bytes(weight) for weight in weights if not is_external(weight)) <= _INLINE_LIMIT:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(base.resolve()))
        return OnnxRuntimeRunner(gs.export_onnx(graph).SerializeToString(), options)
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        save_graph(graph, Path(folder) / "model.onnx")
        return OnnxRuntimeRunner(Path(folder) / "model.onnx", options)
