"""The recipe: what to do to a model. Read from YAML or a mapping into one strictly validated object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_serializer, field_validator

from trimtab.compiler.engine_options import MAX_THREADS, EngineOptions
from trimtab.compiler.schema.explain import explain, shown, suggest
from trimtab.compiler.schema.yaml_text import parse_yaml, read_yaml
from trimtab.compiler.workload import MAX_SIZE, Workload
from trimtab.passes import Pass, pass_class
from trimtab.passes.errors import RecipeError
from trimtab.passes.needs import Need


class Calibration(BaseModel):
    """How the Profile is measured.

    Attributes:
        samples: maximum number of texts or rows.
        batch_size: number of samples in one run.
        max_tokens: texts are cut to this many tokens.
        states: number of FFN inputs stored per layer, a uniform sample of all tokens.
        seed: random seed of that sample.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    samples: int = Field(512, ge=1, le=1 << 24)
    batch_size: int = Field(16, ge=1, le=1 << 16)
    max_tokens: int = Field(128, ge=1, le=MAX_SIZE)
    states: int = Field(4096, ge=1, le=1 << 24)
    seed: int = Field(0, ge=0, lt=1 << 63)


class Recipe(BaseModel):
    """What to do to a model.

    Attributes:
        passes: the passes in the order they run. Written as names or {name: {option: value}}.
        target: name of the runtime to build for.
        workload: the sizes that the engine must serve.
        calibration: how the Profile is measured, if a pass needs one and none is given.
        threads: CPU threads of the engine, of each shard, and of calibration; None leaves it to the runtime.
        engine: options for building engines; only for targets that build engines.
        shards: number of processes among which FFNs and head are divided; 1 divides nothing.
        check: compare the finished engine with the dense model before the build is committed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    passes: tuple[SerializeAsAny[Pass], ...] = Field(default_factory=lambda: (_read_pass("ffn-split", "passes[0]"),))
    target: str = "onnxruntime"
    workload: Workload = Field(default_factory=Workload)
    calibration: Calibration = Calibration()
    engine: EngineOptions = EngineOptions()
    threads: int | None = Field(None, ge=1, le=MAX_THREADS)
    shards: int = Field(1, ge=1, le=64)
    check: bool = True

    @field_validator("passes", mode="before")
    @classmethod
    def _read_passes(cls, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RecipeError(f"passes: should be a list, not {shown(value)}", hint="such as `passes: [ffn-split]`")
        return tuple(_read_pass(item, f"passes[{i}]") for i, item in enumerate(value))

    @field_validator("passes")
    @classmethod
    def _check_order(cls, passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
        for place, later in enumerate(passes):
            for step in passes[:place]:
                reason = step.bars(later)
                if reason is not None:
                    message = f"passes[{place}]: {later.name} cannot run behind {step.name}: {reason}"
                    where = "there once" if step.name == later.name else f"behind {later.name}"
                    raise RecipeError(message, hint=f"put {step.name} {where}")
            missing = set(later.behind) - {step.name for step in passes[:place]}
            if missing:
                name = min(missing)
                message = f"passes[{place}]: {later.name} works on what {name} makes, which is not in front of it"
                raise RecipeError(message, hint=f"put {name} in front of {later.name}")
        return passes

    @field_serializer("passes")
    def _write_passes(self, passes: tuple[Pass, ...]) -> list[dict[str, Any]]:
        return [{step.name: step.model_dump(mode="json")} for step in passes]

    @property
    def needs_profile(self) -> list[str]:
        """Names of the passes that need a Profile."""
        return [step.name for step in self.passes if step.needed()]

    @property
    def needs(self) -> frozenset[Need]:
        """What the passes read from the Profile."""
        return frozenset().union(*(step.needed() for step in self.passes))

    def canonical(self) -> str:
        """A canonical text of the recipe, as sorted JSON with every default filled in; equal for equal recipes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def to_yaml(self) -> str:
        """The recipe with every default filled in; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(recipe: Path | str | Mapping[str, Any] | Recipe | None = None) -> Recipe:
    """Read a recipe from a YAML file or a mapping; None stands for the default one.

    Raises:
        RecipeError: the file is not YAML, a key is unknown (suggests the nearest), or a value is impossible (states the
            bound).
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Mapping):
        return _validate(recipe)
    try:
        return _validate(read_yaml(Path(recipe)))
    except RecipeError as error:
        message = error.message if error.message.startswith(str(recipe)) else f"{recipe}: {error.message}"
        raise RecipeError(message, hint=error.hint) from error


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with some values replaced.

    Args:
        settings: "ffn-split.heavy=0.25" sets an option of a pass of the recipe, "ffn-split.budget.time=0.5" a key of an
            option; "workload.batch=[1, 8, 8]" and "target=tensorrt-rtx" set the recipe's own keys. Values are YAML.

    Raises:
        RecipeError: a setting has no "=", names no pass or key of the recipe, or has an impossible value.
    """
    data = recipe.model_dump(mode="json")
    for setting in settings:
        path, equals, text = setting.partition("=")
        *sections, key = path.strip().split(".")
        if not equals or not key or not all(sections):
            raise RecipeError(
                f"--set {setting}: not of the form pass.option=value",
                hint="such as --set ffn-split.heavy=0.5; `trimtab passes` lists passes and their options",
            )
        value = parse_yaml(text, f"--set {setting}")
        for mapping in _mappings(data, sections[:1]):
            _nested(mapping, sections[1:])[key] = value
    return _validate(data)


def _mappings(data: dict[str, Any], sections: list[str]) -> list[dict[str, Any]]:
    """The mappings with a name: every pass, or the section, of that name; without a name, the recipe itself."""
    if not sections:
        return [data]
    (name,) = sections
    matches = [item[name] for item in data["passes"] if name in item]
    if not matches and isinstance(data.get(name), dict):
        matches = [data[name]]
    if not matches:
        parts = [key for key, value in data.items() if isinstance(value, dict)]
        names = [*(key for item in data["passes"] for key in item), *parts]
        raise RecipeError(f"--set {name}: the recipe has no such pass or section; {suggest(name, names, 'it has')}")
    return matches


def _nested(mapping: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The mapping under `keys` in `mapping`; a new one is added if there is none."""
    for key in keys:
        inner = mapping.get(key)
        mapping[key] = dict(inner) if isinstance(inner, dict) else {}
        mapping = mapping[key]
    return mapping


def _validate(data: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise explain(error, Recipe) from error


def _read_pass(item: Any, where: str) -> Pass:
    """Read an item of `passes`: "name" or {name: {option: value}}."""
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(
            f"{where}: should be a pass name or {{name: {{option: value}}}}, not {shown(item)}",
            hint="such as `passes: [unpad, {ffn-split: {heavy: 0.5}}]`",
        )
    ((name, options),) = item.items()
    try:
        kind = pass_class(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from error
    if not isinstance(options, Mapping | None):
        raise RecipeError(
            f"{where}.{name}: should be a mapping of options, not {shown(options)}",
            hint="`trimtab passes NAME` lists the options of a pass",
        )
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        raise explain(error, kind, where=f"{where}.{name}") from error
