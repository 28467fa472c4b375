"""The method `magic-pyramid` of `trimtab train`."""

from __future__ import annotations

from typing import ClassVar

from trimtab.training import contract
from trimtab.training.magic_pyramid.settings import Settings


class MagicPyramid(contract.Trainer):
    """Trains a classifier of texts whose unimportant tokens leave on the way up, and whose samples leave once sure."""

    name: ClassVar[str] = "magic-pyramid"
    summary: ClassVar[str] = "Train a classifier of texts to prune tokens by learned thresholds, and to exit early."
    makes = "model folder"
    needs: ClassVar[frozenset[contract.Need]] = frozenset({"folder", "labels"})
    settings_class: ClassVar[type[contract.Settings]] = Settings

    def run(self, job: contract.Job) -> contract.Trained | None:
        """Train; a run that was killed goes on if the same is asked for again."""
        from trimtab.training.magic_pyramid.learn import learn

        return learn(job, self.settings)
