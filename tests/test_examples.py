"""The recipes of examples/ are recipes; what they compile is tested where their passes are."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.compiler.recipe import load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_read(path: Path) -> None:
    assert load_recipe(path).passes
