"""Opens sessions of ONNX Runtime, and runs a whole model in one session."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from trimtab.compiler.decoder_cache import Cache, pasts
from trimtab.compiler.engine_options import check_threads
from trimtab.compiler.targets.segmented.runner import SegmentedRunner
from trimtab.compiler.targets.session_segment import SessionSegment
from trimtab.passes.errors import TargetError
from trimtab.passes.ort_errors import opening
from trimtab.plugins import DOMAIN, redeclared
from trimtab.plugins.driver import gpu_present
from trimtab.plugins.library import register

_SLOW_ON_CPU = "SkipLayerNormFusion;BiasSkipLayerNormFusion"
"""Optimisers that are off on the CPU: in 1.31, one op for a sum and its norm is slower than two ops.

Measurement: findings/skip_layer_norm_slower.sh.
"""

_FATAL = 4  # log severity: every error becomes a TrimtabError, so ONNX Runtime need not print it


def session_options(threads: int | None = None, *, spinning: bool = False) -> ort.SessionOptions:
    """Options of every session that trimtab opens, so that engines and their peers run under the same options.

    Args:
        threads: CPU threads of one run; None for one per physical core.
        spinning: whether threads spin for a moment after a run, as by default in ONNX Runtime: the next call then
            starts sooner.

    Raises:
        InputError: `threads` is a count that no machine has.
    """
    check_threads(threads or None)
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
    """The CUDA provider where this onnxruntime has it and a GPU is present; the CPU provider always."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers() and gpu_present()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]


def open_session(
    model: Path | bytes, options: ort.SessionOptions | None = None, *, device: int = 0
) -> ort.InferenceSession:
    """A session over an ONNX file, with the dialect's kernels where the file uses them.

    Args:
        model: the ONNX file, or its bytes. Weights in external data are mapped from disk, not read into a second copy.
        options: `session_options()` by default.
        device: number of the GPU, where the session uses one.

    Raises:
        TargetError: ONNX Runtime does not take the file, or the file uses the dialect of another version of trimtab.
    """
    options = options or session_options()
    if uses_dialect(model):
        register(options)
    source, name = (model, "model in memory") if isinstance(model, bytes) else (str(model), str(model))
    with opening(name):
        return ort.InferenceSession(source, options, providers=_on(device))


def _on(device: int) -> list[str | tuple[str, dict[str, int]]]:
    """`providers()`, with the GPU `device` for the CUDA provider."""
    return [(name, {"device_id": device}) if device and name.startswith("CUDA") else name for name in providers()]


def cache_of(model: Path | bytes, session: ort.InferenceSession) -> Cache | None:
    """The decoder's cache in the ONNX file of `session`; None where it has none, or the model is in memory."""
    if isinstance(model, bytes) or not pasts(tensor.name for tensor in session.get_inputs()):
        return None
    return Cache.of(model)


class OnnxRuntimeRunner(SegmentedRunner):
    """A whole model in one session.

    Args:
        model: the ONNX file, or its bytes.
        options: session options; `session_options()` by default.

    Attributes:
        session: the session that runs the model.
    """

    def __init__(self, model: Path | bytes, options: ort.SessionOptions | None = None) -> None:
        self.session = open_session(model, options)
        self._options = ort.RunOptions()
        self._options.log_severity_level = _FATAL
        segment = SessionSegment(self.session, cache=cache_of(model, self.session), options=self._options)
        super().__init__([segment], segment.inputs, segment.outputs)

    def stop(self) -> None:
        """End runs that are under way in other threads, which raise, and all later ones."""
        self._options.terminate = True


def uses_dialect(model: Path | bytes) -> bool:
    """Whether an ONNX file declares the operator set of trimtab; False for a file that is no ONNX file.

    Raises:
        TargetError: an op of the file has another definition in this version, so today's kernels would misread it.
    """
    try:
        if isinstance(model, bytes):
            proto = onnx.load_model_from_string(model)
        else:
            proto = onnx.load(str(model), load_external_data=False)
    except (DecodeError, OSError):
        return False
    if (op := redeclared(proto)) is not None:
        name = "model in memory" if isinstance(model, bytes) else str(model)
        raise TargetError(
            f"{name}: was compiled by another version of trimtab, whose op {op} has other inputs or outputs",
            hint="compile it again, or run it with that version",
        )
    return any(domain.domain == DOMAIN for domain in proto.opset_import)
