"""ONNX Runtime: the compiled graph is the artifact; the runtime optimises the graph when it opens it."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort

from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.targets import trials
from trimtab.compiler.targets.base import MODEL, Runner, Target
from trimtab.compiler.targets.crossover import measured_crossover
from trimtab.compiler.targets.kernels import has_kernel, optimised
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, open_session, session_options
from trimtab.compiler.targets.sharded.runner import ShardedRunner
from trimtab.compiler.workload import Workload
from trimtab.passes.contract import Capability
from trimtab.passes.crossover import Measure
from trimtab.passes.settle import fuse_bias_gelu, keep_integer_products, tighten_decoder, use_int4_linear

log = logging.getLogger(__name__)


class OnnxRuntime(Target):
    """One ONNX file, run on the CPU, or by the CUDA provider where it is installed and a GPU is present."""

    name = "onnxruntime"
    summary = "the ONNX file itself, optimised by ONNX Runtime when it is opened; CPU, and CUDA where present"
    divides = True

    def probe(self) -> Capability:
        return _probe()

    def crossover(self, threads: int | None = None) -> Measure | None:
        return lambda shape: measured_crossover(shape, lambda: session_options(threads))

    def settle(self, graph: gs.Graph, max_tokens: int | None, shards: int) -> None:
        keep_integer_products(graph)
        fuse_bias_gelu(graph)
        # Shards divide gate and up, so they are not fused.
        tighten_decoder(graph, max_tokens, gates=shards == 1, glu=self.probe().glu_kernel)
        if shards == 1 and self.probe().int4_kernel:
            use_int4_linear(graph)

    def build(
        self,
        model: Path,
        workload: Workload,
        out: Path,
        *,
        timeout_s: float = 3600,
        options: EngineOptions | None = None,
    ) -> list[Path]:
        """Check that the runtime takes the graph; there is nothing to write.

        Optimisation and prepacking are left to `open`, so that a model larger than memory can be checked too.
        """
        light = session_options()
        light.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        light.add_session_config_entry("session.disable_prepacking", "1")
        open_session(model, light)
        return []

    def open(
        self, folder: Path, *, threads: int | None = None, shards: int = 1, manifest_hash: str | None = None
    ) -> Runner:
        if shards > 1:
            return ShardedRunner(folder, threads=threads, manifest_hash=manifest_hash)
        return OnnxRuntimeRunner(folder / MODEL, session_options(threads, spinning=True))


@lru_cache
def _probe() -> Capability:
    bits = frozenset(bits for bits in (2, 4, 8) if _multiplies_blocks(bits))
    capability = Capability(
        weight_bits=bits, negative_scales=_multiplies_blocks(4, signed=True), float16=_computes_half(),
        saturates=_saturates(), row_scales=has_kernel("Int8Linear"),
        int4_kernel=has_kernel("Int4Linear"), glu_kernel=has_kernel("Glu"),
    )  # fmt: skip
    log.debug("onnxruntime %s: %s", ort.__version__, capability)
    return capability


def _multiplies_blocks(bits: int, *, signed: bool = False) -> bool:
    """Whether MatMul(x, DequantizeLinear(w)) becomes one MatMulNBits with right results.

    The kernel may round x to int8 by blocks, hence the tolerance.

    Args:
        signed: whether half of the scales are negative.
    """
    model, w = trials.blockwise(bits, signed=signed)
    x = np.random.default_rng(0).normal(size=(3, trials.K)).astype(np.float32)
    result = optimised(model, x)
    return (
        result is not None
        and result[1] == {"MatMulNBits"}
        and bool(np.abs(result[0] - x @ w).max() < 0.03 * np.abs(x @ w).max())
    )


def _computes_half() -> bool:
    """Whether float16 stays float16; without such kernels, ONNX Runtime casts to float32 and back."""
    result = optimised(trials.half(), np.ones((3, trials.K), np.float16))
    return result is not None and "Cast" not in result[1]


def _saturates() -> bool:
    """Whether sums of integer products overflow on the way, as they do on x86 without VNNI."""
    model, want = trials.largest()
    result = optimised(model, np.full((1, trials.K), 255, np.uint8))
    return result is not None and bool(np.any(result[0] != want))
