"""How trimtab opens sessions of ONNX Runtime, and a whole model in one of them."""

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
"""One op for a sum and its norm takes the CPU longer than two in 1.31: findings/skip_layer_norm_slower.sh."""

_FATAL = 4  # log severity: every error becomes a message of ours, so nothing is printed beside it


def session_options(threads: int | None = None, *, spinning: bool = False) -> ort.SessionOptions:
    """Options of every session that trimtab opens, so that engines and their peers run under the same ones.

    Args:
        threads: of one run; None for one per physical core.
        spinning: threads wait for the next run awake for a moment, as ONNX Runtime lets them by default: calls that
            follow each other start sooner.

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
    """CUDA where this onnxruntime has it and a GPU is present; the CPU always."""
    cuda = "CUDAExecutionProvider" in ort.get_available_providers() and gpu_present()
    return ["CUDAExecutionProvider", "CPUExecutionProvider"] if cuda else ["CPUExecutionProvider"]


def open_session(
    model: Path | bytes, options: ort.SessionOptions | None = None, *, device: int = 0
) -> ort.InferenceSession:
    """A session over an ONNX file, with the dialect's kernels where the file uses them.

    Args:
        model: the ONNX file, or its bytes. Weights in external data are mapped from disk, not read into a second copy.
        options: `session_options()` by default.
        device: number of the GPU, where one is used.

    Raises:
        TargetError: ONNX Runtime does not take it, or it uses the dialect of another version of trimtab.
    """
    options = options or session_options()
    if uses_dialect(model):
        register(options)
    given, name = (model, "model in memory") if isinstance(model, bytes) else (str(model), str(model))
    with opening(name):
        return ort.InferenceSession(given, options, providers=_on(device))


def _on(device: int) -> list[str | tuple[str, dict[str, int]]]:
    """`providers()`, where the CUDA one takes the GPU `device`."""
    return [(name, {"device_id": device}) if device and name.startswith("CUDA") else name for name in providers()]


def cache_of(model: Path | bytes, session: ort.InferenceSession) -> Cache | None:
    """What the ONNX file of `session` tells of a decoder's cache; None where it has none, or is in memory."""
    if isinstance(model, bytes) or not pasts(tensor.name for tensor in session.get_inputs()):
        return None
    return Cache.of(model)


class OnnxRuntimeRunner(SegmentedRunner):
    """A whole model in one session.

    Args:
        model: the ONNX file, or its bytes.
        options: session options; `session_options()` by default.

    Attributes:
        session: which runs it.
    """

    def __init__(self, model: Path | bytes, options: ort.SessionOptions | None = None) -> None:
        self.session = open_session(model, options)
        segment = SessionSegment(self.session, cache=cache_of(model, self.session))
        super().__init__([segment], segment.inputs, segment.outputs)


def uses_dialect(model: Path | bytes) -> bool:
    """Whether an ONNX file declares the operator set of trimtab. What is no ONNX file does not.

    Raises:
        TargetError: an op was another one when the file was made, which the kernels of today would misread.
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
            f"{name}: was compiled by another version of trimtab, whose op {op} takes or gives something else",
            hint="compile it again, or run it by that version",
        )
    return any(domain.domain == DOMAIN for domain in proto.opset_import)
