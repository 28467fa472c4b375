"""Peers of a compiled model: engines of the dense model, as users run it without trimtab."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from trimtab.compiler.checks.peers.model import CalibrationData, PeerModel, peer_model
from trimtab.compiler.feeds import Run
from trimtab.compiler.schema.explain import suggest
from trimtab.passes.errors import TargetError

DENSE, INT8 = "dense-fp32", "dense-int8"

_PEERS = {
    DENSE: "trimtab.compiler.checks.peers.ort:dense_fp32",
    INT8: "trimtab.compiler.checks.peers.ort:dense_int8",
    "ort-fp32-default": "trimtab.compiler.checks.peers.ort_default:fp32",
    "ort-int8-default": "trimtab.compiler.checks.peers.ort_default:int8",
    "openvino-fp32": "trimtab.compiler.checks.peers.openvino:fp32",
    "openvino-bf16": "trimtab.compiler.checks.peers.openvino:bf16",
    "openvino-int8": "trimtab.compiler.checks.peers.openvino_int8:int8",
}
"""Name → a function of (PeerModel, threads) that gives a Run; its module is imported on first use."""

PEER_NAMES = tuple(_PEERS)


def check_peers(names: Iterable[str], more: Iterable[str] = ()) -> None:
    """Refuse names of unknown peers.

    Args:
        more: further names that are allowed.

    Raises:
        TargetError: no such peer; names the nearest.
    """
    allowed = (*PEER_NAMES, *more)
    for name in names:
        if name not in allowed:
            raise TargetError(f"unknown peer {name!r}", hint=suggest(name, allowed, "known peers"))


def open_peer(name: str, dense: Path | PeerModel, threads: int) -> Run:
    """The dense model, ready to run as the peer called `name` runs it.

    Args:
        dense: the dense model, or one ONNX file that serves as all of its forms.
        threads: CPU threads of the peer.

    Raises:
        TargetError: no such peer (names the nearest), its runtime is not installed, or it needs data and has none.
    """
    module, attribute = _module(name).split(":")
    model = dense if isinstance(dense, PeerModel) else PeerModel.of(dense)
    run: Run = getattr(import_module(module), attribute)(model, threads)
    return run


def _module(name: str) -> str:
    check_peers([name])
    return _PEERS[name]


__all__ = ["DENSE", "INT8", "PEER_NAMES", "CalibrationData", "PeerModel", "check_peers", "open_peer", "peer_model"]
