"""What FFN passes lose by their own measure: said, and refused beyond `max_error`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import zoo
from rewrite import canonical, profile_of

from trimtab.passes import PassContext, PassResult, pass_class, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import PassError, RecipeError
from trimtab.passes.sparse_ffn import rewritten

LOSSY: dict[str, dict[str, Any]] = {
    "ffn-topk": {"density": 0.25, "take": 0.25, "rank": 8, "block": 4},
    "ffn-threshold": {"sparsity": 0.6},
    "ffn-route": {"router": "fitted", "sparsity": 0.5, "group": 4},
}


def rewrite(name: str, family: str, **options: object) -> PassResult:
    graph = canonical(zoo.exported(family))
    step = pass_class(name).model_validate(LOSSY[name] | {"most": 1.0} | options)
    return run_passes(graph, [step], PassContext(profile_of(graph)))[0]


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
@pytest.mark.parametrize("name", LOSSY)
def test_more_is_refused(name: str, family: str) -> None:
    details = rewrite(name, family, max_error=None).details
    ffns = len(find_anatomy(canonical(zoo.exported(family))).ffns)
    lost = sum(row["error"] for row in details["layers"]) / ffns
    assert details["error"] == pytest.approx(lost, abs=1e-4)
    assert lost > 0.001
    assert rewrite(name, family, max_error=1.01 * lost).details == details
    with pytest.raises(PassError, match="held-out") as raised:
        rewrite(name, family, max_error=0.9 * lost)
    assert name in raised.value.message
    assert "max_error: null" in str(raised.value)


@pytest.mark.parametrize("rest", [None, {"rank": 8}])
def test_a_top_k_errs_by_what_its_choice_leaves_out(rest: dict[str, int] | None) -> None:
    """A choice of all neurons loses nothing, fewer lose more, and a rest is reckoned with."""
    found = [
        rewrite("ffn-topk", "llama", density=density, take=density, max_error=None, rest=rest).details["error"]
        for density in (1.0, 0.75, 0.25)
    ]
    assert found[0] == 0
    assert 0 < found[1] < found[2]
    if rest is not None:
        assert found[2] < rewrite("ffn-topk", "llama", max_error=None).details["error"]


def test_layers_that_stay_dense_lose_nothing() -> None:
    whole = rewrite("ffn-topk", "llama", max_error=None).details
    one = rewrite("ffn-topk", "llama", layers=[0], max_error=None).details
    assert one["error"] == pytest.approx(whole["layers"][0]["error"] / 2, abs=1e-4)


def test_models_that_learned_a_top_k_are_not_judged_by_the_dense_one() -> None:
    details = rewrite("ffn-topk", "llama", exact=True, max_error=0.001).details
    assert "error" not in details and all("error" not in row for row in details["layers"])


def test_an_error_that_is_no_number_is_refused() -> None:
    row = {"layer": 0, "bytes": 1, "error": float("nan")}
    ffns = find_anatomy(canonical(zoo.exported("llama"))).ffns[:1]
    assert rewritten("ffn-topk", ffns, [row], []).changed == 1
    with pytest.raises(RecipeError, match="error of nan"):
        rewritten("ffn-topk", ffns, [row], [], 0.25)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", [*LOSSY, "ffn-split", "ffn-split within a budget"])
def test_states_beyond_what_numbers_hold_are_refused(name: str, family: str) -> None:
    """Finite, as a Profile must be, but their products are not."""
    graph = canonical(zoo.exported(family))
    profile = profile_of(graph)
    for key, value in profile.tensors.items():
        if key.endswith(".states"):
            profile.tensors[key] = (value * np.float32(1e36)).astype(np.float32)
    budget = {"budget": {"size": 0.3}} if name.endswith("budget") else {}
    step = pass_class(name.split(" ")[0]).model_validate(LOSSY.get(name, {}) | budget)
    with np.errstate(all="ignore"), pytest.raises(PassError, match="so large or so small that a fit"):
        run_passes(graph, [step], PassContext(profile))


def test_the_usual_bound() -> None:
    """In a process of its own: here, models of random weights may lose any amount."""
    code = (
        "from trimtab.passes import pass_class\n"
        f"print({{pass_class(name).model_validate({{}}).max_error for name in {[*LOSSY]!r}}})"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert np.isclose(float(told.strip().strip("{}")), 0.5)
