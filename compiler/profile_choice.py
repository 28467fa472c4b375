"""The choice of the Profile that a compile or a training uses: the user's, or the one in the model's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.passes.contract import check_needs
from trimtab.passes.errors import NotLearnedError, ProfileError
from trimtab.passes.needs import Learned
from trimtab.passes.profile import PROFILE, Profile, read_info

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfileChoice:
    """The Profile that a compile uses, if one exists before calibration.

    Attributes:
        profile: the Profile; None where there is none.
        path: the file of the Profile; None if it was given as an object.
        unused: the Profile's file in the model's folder, if the compile does not use it.
        method: the method of `trimtab train` whose results passes need; None if calibration is enough.
    """

    profile: Profile | None = None
    path: Path | None = None
    unused: Path | None = None
    method: str | None = None

    @property
    def origin(self) -> str | None:
        """The name of the Profile in the manifest and the report."""
        if self.profile is None:
            return None
        return str(self.path.resolve()) if self.path is not None else "an object in memory"

    def check(self, fingerprint: str) -> None:
        """Check that the Profile belongs to the model; for an unused Profile of another model, log a warning.

        Args:
            fingerprint: `model_fingerprint` of the model.

        Raises:
            ProfileError: the Profile belongs to another model; a NotLearnedError if passes need results of training.
        """
        if self.profile is not None:
            where = "the profile" if self.path is None else f"the profile {self.path}"
            with _to_learn(self.method, instead="give the model and the profile that belong together"):
                self.profile.check(fingerprint, where)
        elif self.unused is not None:
            try:
                of_other_model = read_info(self.unused).model != fingerprint
            except ProfileError as error:
                log.warning("not used: %s", error.message)
                return
            if of_other_model:
                log.warning("not used: the profile %s belongs to another model", self.unused)


def choose_profile(
    profile: Profile | Path | str | None, model: Source | Path | str, recipe: Recipe, *, data: bool
) -> ProfileChoice:
    """Choose the Profile for `model`: `profile`, else the one in the model's folder if `recipe` needs one.

    Args:
        profile: a Profile, or its file.
        data: whether calibration data are given. They take precedence over the measurements of the Profile in the
            folder, but not over what training learned.

    Raises:
        ProfileError: the Profile is missing, damaged, or of another format; a NotLearnedError if passes need results of
            training.
    """
    method = _method(recipe)
    if isinstance(profile, Profile):
        return ProfileChoice(profile, method=method)
    if profile is None:
        _warn_of_routers(model, recipe)
    path = Path(profile) if profile is not None else _in_folder(model, PROFILE)
    if path is None:
        return ProfileChoice()
    if profile is None and method is None and (data or not recipe.needs_profile):
        return ProfileChoice(unused=path)
    if profile is None:
        log.info("the profile is %s, in the folder of the model", path)
    with _to_learn(method):
        return ProfileChoice(Profile.load(path), path, method=method)


def _in_folder(model: Source | Path | str, name: str) -> Path | None:
    """The file `name` in the folder of `model`; None if the model is not a folder, or does not have the file."""
    if isinstance(model, Source) and model.kind == "torch":
        return None
    path = Path(model.origin if isinstance(model, Source) else model).expanduser() / name
    return path if path.is_file() else None


def _warn_of_routers(model: Source | Path | str, recipe: Recipe) -> None:
    """Warn that the model was trained to compute only some neurons, if the recipe makes it compute all of them."""
    if Learned("lte") in recipe.needs:
        return
    profile, record = (_in_folder(model, name) for name in (PROFILE, "lte.json"))
    with suppress(OSError, ValueError, AttributeError, ProfileError):  # reported when the Profile is loaded
        if profile is not None and read_info(profile).learned.get("lte", {}).get("routers"):
            log.warning(
                "%s has routers, but this recipe has no pass that uses them: the model was trained to compute the "
                "neurons that they choose, and will compute all of them; add `ffn-route` to the recipe", profile,
            )  # fmt: skip
        elif profile is None and record is not None and json.loads(record.read_text(encoding="utf-8")).get("routers"):
            log.warning(
                "%s: the model was trained to compute the neurons that its routers choose, and will compute all of "
                "them; put its %s back beside it, and add `ffn-route` to the recipe", record, PROFILE,
            )  # fmt: skip


def _method(recipe: Recipe) -> str | None:
    """The first method of `trimtab train` whose results passes need; None if calibration is enough."""
    try:
        check_needs(recipe.passes, None)
    except NotLearnedError as error:
        return error.method
    return None


@contextmanager
def _to_learn(method: str | None, instead: str | None = None) -> Iterator[None]:
    """If a Profile cannot be used and passes need the results of `method`, say how to train again."""
    try:
        yield
    except ProfileError as error:
        if method is None:
            raise
        raise NotLearnedError(error.message, method=method, instead=instead, adds=False) from error
