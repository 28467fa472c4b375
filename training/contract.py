"""The interface of a training method: its settings, its needs, and a run that returns a Profile or a model folder."""

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
"""Inputs that a method requires.

"recipe": the recipe that the model will be compiled with. "profile": statistics of the model, measured on the training
data if no Profile is given. "folder": a Hugging Face directory. "labels": a label for each sample.
"""


class Settings(BaseModel):
    """Settings of all methods. A field is an option of the command line; its constraints are the option's bounds."""

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
    """Model, data and result of a training.

    Attributes:
        model: Hugging Face directory or ONNX file.
        dataset: training data; a part of it is held out.
        out: path of the result. `train` writes it, not the method.
        recipe: the recipe that the model will be compiled with, or None.
        profile: the Profile that learned weights are added to, or None.
        allow_pickle: read pickled weights, which can run code.
        progress: called with (what, done, total).
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
    """Result of a run.

    Attributes:
        record: settings and metrics; JSON types. `history` has a row for each evaluation on the held-out samples.
        summary: one sentence for the user.
        write: writes the Profile or the model folder to a path, atomically.
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
    """Name for `--method`, kebab-case."""
    summary: ClassVar[str]
    """One line for `trimtab methods`."""
    makes: ClassVar[Literal["Profile", "model folder"]]
    """Kind of result: a Profile of the given model, or the folder of a new model."""
    needs: ClassVar[frozenset[Need]]
    settings_class: ClassVar[type[Settings]]
    refit: ClassVar[str | None] = None
    """Options of `trimtab train` that refit learned tensors after another method has tuned the model's weights. None if
    the learned tensors are useless for other weights."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Any = settings

    def check(self, job: Job) -> None:
        """Refuse a job whose recipe or Profile does not fit, before the model is opened.

        Raises:
            TrimtabError: names the missing or wrong part.
        """
        return

    @abstractmethod
    def run(self, job: Job) -> Trained | None:
        """Train.

        Returns:
            the result in the first process of a training, None in its other processes.

        Raises:
            TrimtabError: model or data do not fit the method, or training diverged.
        """


def read_settings(trainer: type[Trainer], settings: Settings | Mapping[str, Any] | None) -> Settings:
    """Validate the settings of a method.

    Raises:
        RecipeError: a setting is unknown (the hint is the nearest one), or a value is out of bounds.
    """
    if isinstance(settings, trainer.settings_class):
        return settings
    values = settings.model_dump() if isinstance(settings, Settings) else dict(settings or {})
    try:
        return trainer.settings_class.model_validate(values)
    except ValidationError as error:
        raise explain(error, trainer.settings_class, where=trainer.name) from error
