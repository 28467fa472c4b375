"""What a training method is: settings, what it needs, and a run that ends in a Profile or a model folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.compiler.progress import Progress
from trimtab.compiler.schema.explain import explain

if TYPE_CHECKING:
    from trimtab.compiler.data import Dataset
    from trimtab.compiler.recipe import Recipe
    from trimtab.passes.profile import Profile

Need = Literal["recipe", "profile", "folder", "labels"]
"""What a method cannot train without.

"recipe": the recipe that the model will be compiled with. "profile": statistics of the model, which are measured on the
training data if no Profile is given. "folder": a Hugging Face directory. "labels": a label for each sample.
"""


class Settings(BaseModel):
    """How to train: what every method has. A field is an option of the command line; its constraints are its bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    minutes: float = Field(10.0, ge=0, description="Minutes to train; the learning rate decays over them.")
    steps: int | None = Field(
        None, ge=0, description="Number of steps, instead of minutes: a run that can be repeated; 0 trains nothing."
    )
    lr: float = Field(5e-5, ge=0, description="Highest learning rate.")
    batch_size: int = Field(32, ge=1, description="Samples per step and process.")
    max_tokens: int = Field(
        128, ge=1, description="Length, in tokens, at which texts are cut, or of the blocks they are packed in."
    )
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of matrices; biases and norms have none.")
    seed: int = Field(0, ge=0, description="Seed of the order of samples and of randomly initialised weights.")


@dataclass(frozen=True)
class Job:
    """What to train, on what.

    Attributes:
        model: Hugging Face directory or ONNX file.
        dataset: to learn from; a part of it is held out.
        out: where the result will be written, by `train` and not by the method.
        recipe: the recipe that the model will be compiled with, if one is given.
        profile: to add to, if one is given.
        allow_pickle: read pickled weights, which can run code.
        progress: is called with (what, done, total).
    """

    model: str
    dataset: Dataset
    out: Path
    recipe: Recipe | None = None
    profile: Profile | None = None
    allow_pickle: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Trained:
    """What a run ends in.

    Attributes:
        record: how it went; JSON types. `history` has a row for each look at the held-out samples.
        summary: one sentence for the user.
        write: puts the Profile or the model folder at a path, whole or not at all.
    """

    record: dict[str, Any]
    summary: str
    write: Callable[[Path], None]


class Trainer(ABC):
    """One method of `trimtab train`.

    Modules that define trainers import no torch: the command line reads names, settings and needs from them.

    Args:
        settings: an instance of `settings_class`.
    """

    name: ClassVar[str]
    """kebab-case, as `--method` has it."""
    summary: ClassVar[str]
    """One line for `trimtab methods`."""
    makes: ClassVar[Literal["Profile", "model folder"]]
    """What `run` ends in: a Profile of the given model, or the folder of a new one."""
    needs: ClassVar[frozenset[Need]]
    settings_class: ClassVar[type[Settings]]
    refit: ClassVar[str | None] = None
    """Options of `trimtab train` that fit what the method learned to weights which another method has tuned since; None
    where it is of no use to other weights than those it was learned for."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Any = settings

    def check(self, job: Job) -> None:
        """Refuse what cannot be trained, as far as recipe and Profile tell: before the model is opened.

        Raises:
            TrimtabError: what is missing or does not fit.
        """
        return

    @abstractmethod
    def run(self, job: Job) -> Trained | None:
        """Train.

        Returns:
            None in all but the first of several processes of one training.

        Raises:
            TrimtabError: model or data do not fit the method, or training diverged.
        """


def read_settings(trainer: type[Trainer], settings: Settings | Mapping[str, Any] | None) -> Settings:
    """Settings of a method, checked.

    Raises:
        RecipeError: an unknown setting, which is named with the nearest known one; or a value out of bounds.
    """
    if isinstance(settings, trainer.settings_class):
        return settings
    given = settings.model_dump() if isinstance(settings, Settings) else dict(settings or {})
    try:
        return trainer.settings_class.model_validate(given)
    except ValidationError as error:
        raise explain(error, trainer.settings_class, where=trainer.name) from error
