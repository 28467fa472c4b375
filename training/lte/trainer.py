"""The method `lte` of `trimtab train`."""

from __future__ import annotations

from typing import ClassVar

from trimtab.training import contract
from trimtab.training.lte.settings import Settings


class LTE(contract.Trainer):
    """Trains a model whose FFNs compute the groups of neurons that learned routers choose for each token."""

    name: ClassVar[str] = "lte"
    summary: ClassVar[str] = "Train routers that choose the FFN neurons each token needs, and the model with them."
    makes = "model folder"
    refit: ClassVar[str | None] = "--method lte"
    needs: ClassVar[frozenset[contract.Need]] = frozenset({"folder"})
    settings_class: ClassVar[type[contract.Settings]] = Settings

    def run(self, job: contract.Job) -> contract.Trained | None:
        """Train; a run that was killed goes on if the same is asked for again."""
        from trimtab.training.lte.learn import learn

        return learn(job, self.settings)
