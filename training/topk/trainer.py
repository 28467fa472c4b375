"""The method `topk` of `trimtab train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from trimtab.passes.errors import RecipeError
from trimtab.training import contract
from trimtab.training.topk.settings import Settings

if TYPE_CHECKING:
    from trimtab.passes.ffn_topk.topk import FFNTopK


class TopK(contract.Trainer):
    """Fine-tunes a model whose FFNs keep of each token the neurons that the recipe's `ffn-topk` wants."""

    name: ClassVar[str] = "topk"
    summary: ClassVar[str] = "Fine-tune a model to do with the neurons that the recipe's `ffn-topk` wants."
    makes = "model folder"
    needs: ClassVar[frozenset[contract.Need]] = frozenset({"recipe", "folder"})
    settings_class: ClassVar[type[contract.Settings]] = Settings

    def check(self, job: contract.Job) -> None:
        """Check that the recipe has `ffn-topk`, which sets the number of neurons."""
        wanted(job)

    def run(self, job: contract.Job) -> contract.Trained | None:
        """Fine-tune; under torchrun or accelerate's launcher, each process works on its share of the batches."""
        from trimtab.training.topk.finetune import finetune

        return finetune(job, wanted(job), self.settings)


def wanted(job: contract.Job) -> FFNTopK:
    """The recipe's `ffn-topk`.

    Raises:
        RecipeError: the recipe has no `ffn-topk`.
    """
    from trimtab.passes.ffn_topk.topk import FFNTopK

    assert job.recipe is not None, "`train` asks for it"
    for step in job.recipe.passes:
        if isinstance(step, FFNTopK):
            return step
    raise RecipeError(
        "the recipe has no pass 'ffn-topk': it says how many neurons the model shall need",
        hint="add it to `passes`, such as `ffn-topk: {density: 0.1}`",
    )
