"""The method `recover` of `trimtab train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trimtab.passes.errors import RecipeError
from trimtab.training import contract
from trimtab.training.recover.settings import Settings

if TYPE_CHECKING:
    from trimtab.compiler.recipe import Recipe

METHOD = "recover"


class Recover(contract.Trainer):
    """Distils the graph that the recipe's passes before `recover` make from the dense one."""

    name: ClassVar[str] = METHOD
    summary: ClassVar[str] = (
        "Distil the model that the recipe's passes before `recover` make from the dense one, with the rounding that "
        "passes behind it bring."
    )
    makes = "Profile"
    needs: ClassVar[frozenset[contract.Need]] = frozenset({"recipe", "profile"})
    settings_class: ClassVar[type[contract.Settings]] = Settings

    def check(self, job: contract.Job) -> None:
        """Check the recipe, and that the Profile holds what the passes before `recover` have to have learned."""
        from trimtab.compiler.pipeline import check_fit
        from trimtab.compiler.targets import get_target
        from trimtab.passes.contract import check_needs

        plan = _recipe(job)
        check_needs(plan.passes[: check_recipe(plan)], job.profile)
        check_fit(plan, get_target(plan.target).probe())  # or it could not be compiled with what it learned

    def run(self, job: contract.Job) -> contract.Trained:
        """Distil; the Profile is the given one, or one that is measured on the data, with the learned weights added."""
        from trimtab.compiler.profile_cache import measured_profile
        from trimtab.compiler.sources import open_source
        from trimtab.compiler.targets import get_target
        from trimtab.passes.needs import DEFAULT
        from trimtab.training.recover.recover import recover

        plan, source = _recipe(job), open_source(job.model, allow_pickle=job.allow_pickle)
        profile = job.profile or measured_profile(
            source, job.dataset, plan.calibration, needs=DEFAULT | plan.needs, progress=job.progress
        )
        profile.check(source.fingerprint)
        learned = recover(
            source, plan, job.dataset, profile, self.settings, capability=get_target(plan.target).probe(),
            progress=job.progress,
        )  # fmt: skip
        record = {key: value for key, value in learned.info.learned[METHOD].items() if key != "from"}
        return contract.Trained(record, f"kept the best of these, in {job.out}", learned.save)


def _recipe(job: contract.Job) -> Recipe:
    assert job.recipe is not None, "`train` asks for it"
    return job.recipe


def check_recipe(recipe: Recipe) -> int:
    """The place of `recover` in the recipe.

    Raises:
        RecipeError: it has none.
    """
    names = [step.name for step in recipe.passes]
    if METHOD not in names:
        raise RecipeError(
            f"the recipe has no pass {METHOD!r}: what is learned would not be used",
            hint=f"add {METHOD!r} to `passes`, behind those that change the model and before those that quantize it",
        )
    return names.index(METHOD)
