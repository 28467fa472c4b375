"""The task quality of peers, on the same samples and against the same dense model as the build's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from trimtab.compiler.checks.peers import PeerModel, check_peers, open_peer
from trimtab.compiler.checks.quality import Quality
from trimtab.compiler.feeds import Run
from trimtab.passes.errors import DataError

_BUILD = "trimtab"
_NOT_SHOWN = ("kind", "samples", "tokens", "worst")


def require_data(peers: Sequence[str], data: object) -> None:
    """Refuse unknown peers, and peers without data to measure their quality on, before minutes of work.

    Raises:
        TargetError: no such peer.
        DataError: there are peers and no data.
    """
    check_peers(peers)
    if peers and data is None:
        raise DataError("the quality of a peer needs data to measure it on", hint="give held-out data with --data")


def peer_qualities(
    peers: Sequence[str], model: PeerModel, threads: int, judge: Callable[[Run], Quality]
) -> dict[str, Quality]:
    """Name of each peer → its quality.

    Args:
        threads: CPU threads of each peer; 0 for one per physical core.
        judge: measures the quality of one engine.
    """
    return {name: judge(open_peer(name, model, threads)) for name in dict.fromkeys(peers)}


def quality_rows(build: Quality, peers: Mapping[str, Quality]) -> list[dict[str, str | float]]:
    """One row per engine, the build first: the engine's name, and every figure that is one number."""
    return [{"engine": name} | _numbers(quality) for name, quality in {_BUILD: build, **peers}.items()]


def _numbers(quality: Quality) -> dict[str, float]:
    fields = quality.model_dump(mode="json")
    return {name: value for name, value in fields.items() if isinstance(value, int | float) and name not in _NOT_SHOWN}
