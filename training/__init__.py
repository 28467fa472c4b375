"""Training with torch, for passes that need learned weights. Only `trimtab train` imports this package.

Each method of `trimtab train` is one folder, whose `trainer.py` has a subclass of `Trainer`. Listing the methods and
reading their settings do not import torch.
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
"""Method name → module and class. `trainer_class` imports the module."""

METHOD_NAMES = tuple(_METHODS)


def trainer_class(name: str) -> type[Trainer]:
    """The trainer of the method called `name`.

    Raises:
        TrimtabError: no method has this name; the hint is the nearest name.
    """
    trainer: type[Trainer] = import_named(name, _METHODS, "training method", "training methods", TrimtabError)
    return trainer


__all__ = ["METHOD_NAMES", "Job", "Settings", "Trained", "Trainer", "trainer_class"]
