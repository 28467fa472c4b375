"""Corners of a workload, as calls that the model takes."""

from __future__ import annotations

import pytest
import zoo

from trimtab.compiler.checks.corners import calls_at, corners
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import RecipeError
from trimtab.passes.graph import load_graph


@pytest.fixture(scope="module")
def decoder():
    return load_graph(zoo.exported("llama", "cached"))


def possible(dims: dict[str, int]) -> bool:
    return dims["past"] == 0 or dims["batch"] == 1 or dims["tokens"] == 1


def test_several_tokens_behind_a_past_come_in_one_row(decoder) -> None:
    """Both ends of every range are still reached, each once."""
    workload = Workload(batch=(1, 3, 5), tokens=(1, 6, 9), past=(0, 4, 12))
    found = corners(decoder, workload)
    assert all(possible(dims) for dims in found)
    for name in ("batch", "tokens", "past"):
        assert {dims[name] for dims in found} >= set(getattr(workload, name))
    assert len({tuple(dims.items()) for dims in found}) == len(found)


def test_calls_near_one_that_the_model_does_not_take(decoder) -> None:
    workload = Workload(batch=(1, 3, 5), tokens=(2, 6, 9), past=(0, 4, 12))
    sizes = {"batch": 5, "tokens": 9, "past": 12}
    assert calls_at(decoder, workload, sizes) == [sizes | {"past": 0}, sizes | {"batch": 1}]
    for taken in (sizes | {"batch": 1}, sizes | {"past": 0}, sizes | {"tokens": 1}):
        assert calls_at(decoder, workload, taken) == [taken]
    assert calls_at(load_graph(zoo.exported("llama")), workload, sizes) == [sizes]  # no such attention


def test_a_workload_of_no_such_call_is_refused(decoder) -> None:
    with pytest.raises(RecipeError, match="2 rows of 3 tokens behind a past of 4") as caught:
        corners(decoder, Workload(batch=2, tokens=3, past=(4, 4, 8)))
    assert "workload.past begin at 0" in str(caught.value.hint)
