"""The method `magic-pyramid` of `trimtab train`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from trimtab.passes.errors import ProfileError, RecipeError
from trimtab.training import contract
from trimtab.training.before import learned_before
from trimtab.training.magic_pyramid.settings import METHOD, Settings


class MagicPyramid(contract.Trainer):
    """Trains a classifier of texts whose unimportant tokens leave on the way up, and whose samples leave once sure."""

    name: ClassVar[str] = METHOD
    summary: ClassVar[str] = "Train a classifier of texts to prune tokens by learned thresholds, and to exit early."
    makes = "model folder"
    refit: ClassVar[str | None] = "--method magic-pyramid --soft 0 --hard 0"
    needs: ClassVar[frozenset[contract.Need]] = frozenset({"folder", "labels"})
    settings_class: ClassVar[type[contract.Settings]] = Settings

    def check(self, job: contract.Job) -> None:
        """As `Trainer.check`: a stage needs thresholds.

        Raises:
            RecipeError: nothing gives them.
            ProfileError: the model's Profile, which should give them, is damaged.
        """
        if not self.settings.hard or self.settings.makes_thresholds:
            return
        hint = "set hard to 0 too, or give keep, or a model that this method has trained before"
        try:
            learned = learned_before(Path(job.model), METHOD)
        except ProfileError as error:
            message = f"magic-pyramid: hard has no thresholds to prune by: {error.message}"
            raise ProfileError(message, hint=hint) from error
        if not learned:
            raise RecipeError("magic-pyramid: hard has no thresholds to prune by if soft is 0", hint=hint)

    def run(self, job: contract.Job) -> contract.Trained | None:
        """Train; a run that was killed goes on if the same is asked for again."""
        from trimtab.training.magic_pyramid.learn import learn

        return learn(job, self.settings)
