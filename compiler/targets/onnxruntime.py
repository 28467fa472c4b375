"""ONNX Runtime: the compiled graph is the artifact; the runtime optimises it when it opens it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnxruntime.capi import onnxruntime_pybind11_state as state

from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.targets import trials
from trimtab.compiler.targets.base import MODEL, Runner, Steps, Target
from trimtab.compiler.targets.crossover import measured_crossover
from trimtab.compiler.targets.onnxruntime_steps import PAST, Cache, OnnxRuntimeSteps
from trimtab.compiler.workload import Workload
from trimtab.passes.contract import Capability
from trimtab.passes.crossover import Measure
from trimtab.passes.errors import TargetError
from trimtab.plugins import DOMAIN
from trimtab.plugins.driver import gpu_present
from trimtab.plugins.library import register

log = logging.getLogger(__name__)

_REFUSALS: tuple[type[Exception], ...] = (
    ValueError,
    *(found for found in vars(state).values() if isinstance(found, type) and issubclass(found, Exception)),
)
"""ONNX Runtime's own exceptions have no common base."""

_SLOW_ON_CPU = "SkipLayerNormFusion;BiasSkipLayerNormFusion"
"""One op for a sum and its norm takes the CPU longer than two (seen in 1.31, whose kernel is not vectorized)."""

_FATAL = 4  # log severity: every error becomes a message of ours, so nothing is printed beside it


def session_options(threads: int | None = None, *, spinning: bool = False) -> ort.SessionOptions:
    """Options of every session that trimtab opens, so that engines and their peers run under the same ones.

    Args:
        threads: of one run; None for one per physical core.
        spinning: threads wait for the next run awake for a moment, as ONNX Runtime lets them by default: calls that
            follow each other start sooner.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    for key, value in session_entries(providers(), spinning=spinning).items():
        options.add_session_config_entry(key, value)
    return options


def session_entries(providers: list[str], *, spinning: bool = False) -> dict[str, str]:
    """Entries of a session's configuration, where it runs on `providers`."""
    # Spinning threads of one session take the cores from every other session and process.
    entries = {} if spinning else {"session.force_spinning_stop": "1"}
    if providers == ["CPUExecutionProvider"]:
        entries["optimization.disable_specified_optimizers"] = _SLOW_ON_CPU
    return entries


def providers() -> list[str]:
    """CUDA where this onnxruntime has it and a GPU is present; the CPU always."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers() and gpu_present()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]


def _on(device: int) -> list[str | tuple[str, dict[str, int]]]:
    """`providers()`, where the CUDA one takes the GPU `device`."""
    return [(name, {"device_id": device}) if device and name.startswith("CUDA") else name for name in providers()]


class OnnxRuntimeRunner(Runner):
    """A session over an ONNX file. Weights in external data are mapped from disk, not read into a second copy.

    Args:
        model: the ONNX file, or its bytes.
        options: session options; `session_options()` by default.
        device: number of the GPU, where one is used.
    """

    def __init__(self, model: Path | bytes, options: ort.SessionOptions | None = None, *, device: int = 0) -> None:
        options = options or session_options()
        if uses_dialect(model):
            register(options)
        given, name = (model, "model in memory") if isinstance(model, bytes) else (str(model), str(model))
        try:
            self.session = ort.InferenceSession(given, options, providers=_on(device))
        except _REFUSALS as error:
            raise TargetError(f"{name}: ONNX Runtime does not take this graph ({_brief(error)})") from error
        self.inputs = tuple(tensor.name for tensor in self.session.get_inputs())
        self.outputs = tuple(tensor.name for tensor in self.session.get_outputs())
        self._cache: Cache | None = None
        if isinstance(model, Path) and any(name.startswith(PAST) for name in self.inputs):
            self._cache = Cache.of(model)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            outputs = self.session.run(None, dict(inputs))
        except _REFUSALS as error:
            raise TargetError(f"ONNX Runtime could not run the model ({_brief(error)})") from error
        return dict(zip(self.outputs, outputs, strict=True))

    def steps(self, batch: int, length: int) -> Steps:
        if self._cache is None:
            return super().steps(batch, length)
        return OnnxRuntimeSteps(self.session, batch, length, self._cache)


def uses_dialect(model: Path | bytes) -> bool:
    """Whether an ONNX file declares the operator set of trimtab. What is no ONNX file does not."""
    try:
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(str(model), load_external_data=False)
    except (DecodeError, OSError):
        return False
    return any(domain.domain == DOMAIN for domain in proto.opset_import)


class OnnxRuntime(Target):
    """One ONNX file, run on the CPU, or by the CUDA provider where it is installed and a GPU is present."""

    name = "onnxruntime"
    summary = "the ONNX file itself, optimised by ONNX Runtime when it is opened; CPU, and CUDA where present"
    divides = True

    def probe(self) -> Capability:
        return _probe()

    def crossover(self, threads: int | None = None) -> Measure | None:
        return lambda shape: measured_crossover(shape, lambda: session_options(threads))

    def build(
        self,
        model: Path,
        workload: Workload,
        out: Path,
        *,
        timeout_s: float = 3600,
        options: EngineOptions | None = None,
    ) -> list[Path]:
        """Checks that the runtime takes the graph; there is nothing to write.

        Optimisation and prepacking wait until `open`, so that a model larger than memory can be checked too.
        """
        light = session_options()
        light.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        light.add_session_config_entry("session.disable_prepacking", "1")
        OnnxRuntimeRunner(model, light)
        return []

    def open(
        self, folder: Path, *, threads: int | None = None, shards: int = 1, manifest_hash: str | None = None
    ) -> Runner:
        if shards > 1:
            from trimtab.compiler.targets.sharded.runner import ShardedRunner

            return ShardedRunner(folder, threads=threads, manifest_hash=manifest_hash)
        return OnnxRuntimeRunner(folder / MODEL, session_options(threads, spinning=True))


def _brief(error: Exception) -> str:
    """The error without the runtime's prefix and source locations' line breaks."""
    return " ".join(str(error).split(" : ", 2)[-1].split())


@lru_cache
def _probe() -> Capability:
    bits = frozenset(bits for bits in (2, 4, 8) if _multiplies_blocks(bits))
    capability = Capability(weight_bits=bits, float16=_computes_half(), saturates=_saturates())
    log.debug("onnxruntime %s: %s", ort.__version__, capability)
    return capability


def _optimised(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, set[str]] | None:
    """Output of the trial `model`, and the op types ONNX Runtime made of it; None where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=providers())
            (y,) = session.run(None, {"x": x})
        except _REFUSALS:
            return None
        return y, {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def _multiplies_blocks(bits: int) -> bool:
    """Whether MatMul(x, DequantizeLinear(w)) becomes one MatMulNBits, and computes what it should.

    That kernel may round x to int8 by blocks, hence the tolerance.
    """
    model, w = trials.blockwise(bits)
    x = np.random.default_rng(0).normal(size=(3, trials.K)).astype(np.float32)
    found = _optimised(model, x)
    return (
        found is not None
        and found[1] == {"MatMulNBits"}
        and np.abs(found[0] - x @ w).max() < 0.03 * np.abs(x @ w).max()
    )


def _computes_half() -> bool:
    """Whether float16 stays float16; without such kernels, ONNX Runtime casts to float32 and back."""
    found = _optimised(trials.half(), np.ones((3, trials.K), np.float16))
    return found is not None and "Cast" not in found[1]


def _saturates() -> bool:
    """Whether sums of integer products overflow on the way, as they do on x86 without VNNI."""
    model, want = trials.largest()
    found = _optimised(model, np.full((1, trials.K), 255, np.uint8))
    return found is not None and bool(np.any(found[0] != want))
