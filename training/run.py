"""`train`: runs any method, from paths to a written result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.compiler.data import Dataset, read_data
from trimtab.compiler.learned import remedies
from trimtab.compiler.profile_choice import choose_profile
from trimtab.compiler.progress import Progress
from trimtab.compiler.recipe import Recipe, load_recipe, override
from trimtab.compiler.sources.checkpoint import is_checkpoint
from trimtab.compiler.sources.gguf import is_gguf, unpacked
from trimtab.passes.errors import ModelError, ProfileError, RecipeError, TrimtabError
from trimtab.passes.needs import Learned
from trimtab.passes.optional import missing
from trimtab.passes.profile import Profile
from trimtab.training import trainer_class
from trimtab.training.contract import Job, Settings, Trained, Trainer, read_settings
from trimtab.training.folder import check_new_folder

_RECIPE_HINT = "give the recipe behind the model: `trimtab train MODEL RECIPE ...`"


def train(
    method: str, model: Path | str, data: Path | str | Dataset, out: Path | str, *,
    recipe: Path | str | Mapping[str, Any] | Recipe | None = None, changes: Sequence[str] = (),
    profile: Path | str | Profile | None = None, settings: Settings | Mapping[str, Any] | None = None,
    allow_pickle: bool = False, progress: Progress | None = None,
) -> Trained | None:  # fmt: skip
    """Train a model with a method, and write the result.

    Args:
        method: one of `METHOD_NAMES`.
        model: Hugging Face directory, GGUF or ONNX file.
        data: training data; a part of it is held out.
        out: path of the Profile or model folder, written atomically.
        recipe: the recipe that the model will be compiled with.
        changes: changes to the recipe, "pass.option=value".
        profile: the Profile that the method adds to. By default this is the Profile in the model's folder if passes of
            the recipe need its learned weights; else a Profile is measured on the data.
        settings: settings of the method.
        allow_pickle: read pickled weights, which can run code.
        progress: called with (what, done, total).

    Returns:
        the result in the first process of a training, which writes it; None in its other processes.

    Raises:
        TrimtabError: a fault of the input or the environment. Nothing is written to `out` then.
    """
    kind = trainer_class(method)
    trainer, out = kind(read_settings(kind, settings)), Path(out)
    plan = _recipe(kind, recipe, changes)
    dataset = data if isinstance(data, Dataset) else read_data(data)
    with remedies(model=model, recipe=recipe, settings=changes, data=data, profile=profile):
        if is_gguf(Path(model)):
            model = unpacked(Path(model))
        _check_paths(kind, model, profile, out)
        chosen_profile = _profile(kind, profile, model, plan)
        job = Job(str(model), dataset, out, plan, chosen_profile, allow_pickle, progress)
        trainer.check(job)
        trained = _run(trainer, job)
        if trained is not None:
            trained.write(out)
    return trained


def _recipe(
    kind: type[Trainer], recipe: Path | str | Mapping[str, Any] | Recipe | None, changes: Sequence[str]
) -> Recipe | None:
    if recipe is not None:
        return override(load_recipe(recipe), changes)
    if "recipe" in kind.needs:
        raise RecipeError(
            f"--method {kind.name} needs the recipe that the model will be compiled with",
            hint=_RECIPE_HINT,
        )
    if changes:
        raise RecipeError("--set changes a recipe, and none is given", hint=_RECIPE_HINT)
    return None


def _profile(
    kind: type[Trainer], profile: Path | str | Profile | None, model: Path | str, plan: Recipe | None
) -> Profile | None:
    """The Profile to add to: the given one, else the one in the model's folder if it has weights of another method."""
    if plan is None or "profile" not in kind.needs:
        return Profile.load(profile) if isinstance(profile, Path | str) else profile
    others = tuple(step for step in plan.passes if Learned(kind.name) not in step.needed())
    return choose_profile(profile, model, plan.model_copy(update={"passes": others}), data=True).profile


def _check_paths(kind: type[Trainer], model: Path | str, profile: Any, out: Path) -> None:
    if "folder" in kind.needs and not is_checkpoint(Path(model)):
        raise ModelError(
            f"{model}: no Hugging Face directory", hint=f"{kind.name} changes the model itself: give its folder"
        )
    if profile is not None and "profile" not in kind.needs:
        raise RecipeError(f"--method {kind.name} takes no Profile", hint="leave --profile out")
    if kind.makes == "model folder":
        check_new_folder(out)
    elif not out.absolute().parent.is_dir():
        raise ProfileError(f"{out.absolute().parent}: no such folder", hint="make it first")
    elif out.is_dir():
        raise ProfileError(f"{out}: is a folder, and a Profile is a file", hint="give the name of a file")


def _run(trainer: Trainer, job: Job) -> Trained | None:
    try:
        return trainer.run(job)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trimtab"):
            raise
        raise missing("training", error.name or "a package", TrimtabError, "train") from error
