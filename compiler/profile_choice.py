"""Which Profile a compile or a training uses: the one given, or the one in the folder of the model itself."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trimtab.compiler.recipe import Recipe
from trimtab.compiler.sources import Source
from trimtab.passes.contract import check_needs
from trimtab.passes.errors import ProfileError
from trimtab.passes.profile import PROFILE, Profile, read_info

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfileChoice:
    """The Profile that a compile uses, if there is one before it measures any.

    Attributes:
        profile: None where there is none.
        path: the file it was read from; None where it was given as an object.
        unused: the file in the model's folder, where the compile does without it.
    """

    profile: Profile | None = None
    path: Path | None = None
    unused: Path | None = None

    @property
    def origin(self) -> str | None:
        """What manifest and report call it."""
        if self.profile is None:
            return None
        return str(self.path.resolve()) if self.path is not None else "an object in memory"

    def check(self, fingerprint: str) -> None:
        """Check that the Profile is of the model; of one that is not used, note where it is not.

        Args:
            fingerprint: `model_fingerprint` of the model.

        Raises:
            ProfileError: it is of another model.
        """
        if self.profile is not None:
            self.profile.check(fingerprint, "the profile" if self.path is None else f"the profile {self.path}")
        elif self.unused is not None:
            try:
                other = read_info(self.unused).model != fingerprint
            except ProfileError as error:
                log.warning("not used: %s", error.message)
                return
            if other:
                log.warning("not used: the profile %s belongs to another model", self.unused)


def choose_profile(
    given: Profile | Path | str | None, model: Source | Path | str, recipe: Recipe, *, data: bool
) -> ProfileChoice:
    """Choose the Profile for `model`: the one given, else the one in the model's folder if `recipe` needs it.

    Args:
        given: a Profile, or its file.
        data: calibration data are given. They are preferred to what the folder's Profile measured, not to what it
            learned.

    Raises:
        ProfileError: the Profile is missing, damaged, or of another format.
    """
    if isinstance(given, Profile):
        return ProfileChoice(given)
    if given is not None:
        return ProfileChoice(Profile.load(given), Path(given))
    path = _in_folder(model)
    if path is None:
        return ProfileChoice()
    if _learned(recipe) or (recipe.needs_profile and not data):
        log.info("the profile is %s, in the folder of the model", path)
        return ProfileChoice(Profile.load(path), path)
    return ProfileChoice(unused=path)


def _in_folder(model: Source | Path | str) -> Path | None:
    """The Profile in the folder of `model`; None where the model is no folder, or has none in it."""
    if isinstance(model, Source) and model.kind == "torch":
        return None
    path = Path(model.origin if isinstance(model, Source) else model).expanduser() / PROFILE
    return path if path.is_file() else None


def _learned(recipe: Recipe) -> bool:
    """Whether a pass takes what only training gives."""
    try:
        check_needs(recipe.passes, None)
    except ProfileError:
        return True
    return False
