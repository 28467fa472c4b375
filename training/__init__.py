"""Learning, with torch: what passes need beyond statistics. Only `trimtab train` imports this package.

Each method of `trimtab train` is one folder, whose `trainer.py` has a subclass of `Trainer`. Listing the methods, and
reading their settings, imports no torch.
"""

from __future__ import annotations

from trimtab.passes.errors import TrimtabError
from trimtab.passes.registry import import_named
from trimtab.training.contract import Job, Settings, Trained, Trainer

_METHODS = {
    "recover": "trimtab.training.recover.trainer:Recover",
    "topk": "trimtab.training.topk.trainer:TopK",
    "magic-pyramid": "trimtab.training.magic_pyramid.trainer:MagicPyramid",
    "lte": "trimtab.training.lte.trainer:LTE",
}
"""Name → where its class is; imported when asked for."""

METHOD_NAMES = tuple(_METHODS)


def trainer_class(name: str) -> type[Trainer]:
    """The trainer of the method called `name`.

    Raises:
        TrimtabError: there is none; names the nearest.
    """
    trainer: type[Trainer] = import_named(name, _METHODS, "training method", "training methods", TrimtabError)
    return trainer


__all__ = ["METHOD_NAMES", "Job", "Settings", "Trained", "Trainer", "trainer_class"]
