"""What a compiled model is timed against: the dense model, as users would run it otherwise."""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path

from trimtab.compiler.feeds import Run
from trimtab.passes.errors import TargetError

DENSE, INT8 = "dense-fp32", "dense-int8"

_PEERS = {
    DENSE: "trimtab.compiler.checks.peers.ort:dense_fp32",
    INT8: "trimtab.compiler.checks.peers.ort:dense_int8",
    "openvino-fp32": "trimtab.compiler.checks.peers.openvino:fp32",
    "openvino-bf16": "trimtab.compiler.checks.peers.openvino:bf16",
}
"""Name → a function of (dense ONNX file, threads) that gives a Run; imported when asked for."""

PEER_NAMES = tuple(_PEERS)


def open_peer(name: str, dense: Path, threads: int) -> Run:
    """The dense model, ready to run as the peer called `name` runs it.

    Args:
        dense: the dense ONNX file.
        threads: CPU threads it may use.

    Raises:
        TargetError: no such peer (names the nearest), or its runtime is not installed.
    """
    if name not in _PEERS:
        near = difflib.get_close_matches(name, PEER_NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known peers: {', '.join(PEER_NAMES)}"
        raise TargetError(f"unknown peer {name!r}", hint=hint)
    module, attribute = _PEERS[name].split(":")
    run: Run = getattr(import_module(module), attribute)(dense, threads)
    return run


__all__ = ["DENSE", "INT8", "PEER_NAMES", "open_peer"]
