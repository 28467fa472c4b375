"""The workload: names of axes, profiles, corners, and impossible values."""

from __future__ import annotations

import re
from typing import Any

import onnx_graphsurgeon as gs
import pytest
import yaml
import zoo
from pydantic import ValidationError
from rewrite import canonical

from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.workload import Workload
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import RecipeError

SIZES = Workload(batch=(1, 4, 16), tokens=(2, 32, 64))


def graph(**shapes: object) -> gs.Graph:
    return gs.Graph(inputs=[gs.Variable(name, dtype="float32", shape=shape) for name, shape in shapes.items()])


def test_named_axes_give_a_profile_for_every_input() -> None:
    model = graph(ids=["batch", "tokens"], mask=["batch", "tokens"], pixels=["batch", 3, 8, 8], scale=[])
    assert SIZES.shapes(model) == {
        "ids": ((1, 2), (4, 32), (16, 64)),
        "mask": ((1, 2), (4, 32), (16, 64)),
        "pixels": ((1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)),
        "scale": ((), (), ()),
    }


def test_names_win_over_positions() -> None:
    assert SIZES.axes(graph(x=["tokens", "batch", 5])) == {"x": ("tokens", "batch", 5)}
    assert SIZES.axes(graph(x=[1, "sequence_length"])) == {"x": (1, "tokens")}


def test_unknown_names_go_by_position_and_mean_the_same_everywhere() -> None:
    model = graph(lengths=["S"], ids=["N", "S"])
    assert SIZES.axes(model) == {"lengths": ("tokens",), "ids": ("batch", "tokens")}


@pytest.mark.parametrize("unnamed", [None, -1])
def test_axes_without_a_name(unnamed: int | None) -> None:
    assert SIZES.axes(graph(x=[unnamed, unnamed, 4])) == {"x": ("batch", "tokens", 4)}
    third = graph(x=[unnamed, unnamed, unnamed])
    assert Workload(dims={"x.2": 7}).axes(third) == {"x": ("batch", "tokens", "x.2")}


def test_other_dimensions_come_from_dims() -> None:
    model = graph(ids=["batch", "tokens"], boxes=["batch", 2, "boxes", 16])
    with pytest.raises(RecipeError, match=r"input 'x'.*'boxes'.*no range") as caught:
        SIZES.axes(graph(x=["batch", "tokens", "boxes"]))
    assert "dims" in str(caught.value.hint)
    sizes = Workload(dims={"boxes": (1, 24, 99)})
    assert sizes.shapes(model)["boxes"] == ((1, 2, 1, 16), (8, 2, 24, 16), (32, 2, 99, 16))
    assert sizes.shapes_at(model, {"batch": 3, "tokens": 5, "boxes": 7}) == {"ids": (3, 5), "boxes": (3, 2, 7, 16)}


def test_corners_reach_both_ends_of_batch_and_tokens_once_each() -> None:
    corners = SIZES.corners()
    found = [(corner["batch"], corner["tokens"]) for corner in corners]
    assert found == [(1, 2), (4, 32), (16, 64), (16, 2), (1, 64)]
    assert Workload(batch=2, tokens=5).corners() == [{"batch": 2, "tokens": 5}]
    assert all(corner["boxes"] in (1, 2, 3) for corner in Workload(dims={"boxes": (1, 2, 3)}).corners())


def test_a_cache_and_its_new_tokens_make_the_total() -> None:
    model = graph(mask=["batch", "total"], ids=["batch", "tokens"], cache=["batch", 2, "past", 16])
    assert SIZES.shapes(model)["mask"] == ((1, 2), (4, 32), (16, 64))
    assert SIZES.shapes(model)["cache"][1] == (4, 2, 0, 16)
    steps = Workload(batch=2, tokens=1, past=(0, 5, 9))
    assert steps.shapes(model)["mask"] == ((2, 1), (2, 6), (2, 10))
    others = graph(mask=["batch_size", "total_sequence_length"], ids=["batch_size", "sequence_length"])
    assert steps.shapes_at(others, {"batch": 3, "tokens": 2, "past": 4}) == {"mask": (3, 6), "ids": (3, 2)}
    assert [corner["past"] for corner in steps.corners()] == [0, 5, 9]


CACHES = {
    "GenAI's builder": ["batch_size", "sequence_length", "total_sequence_length", "past_sequence_length"],
    "optimum": ["batch_size", "sequence_length", "past_sequence_length + sequence_length", "past_sequence_length"],
    "optimum, one more": ["batch_size", "sequence_length", "past_sequence_length + 1", "past_sequence_length"],
    "letters": ["N", "T", "S", "P"],
    "misleading": ["rows", "tokens", "sequence_length", "seq_len"],
    "none": [None, None, None, None],
}


@pytest.mark.parametrize("names", CACHES.values(), ids=CACHES)
def test_axes_of_a_cache_are_known_by_their_role(names: list[str | None]) -> None:
    batch, tokens, total, past = names
    caches = {f"past_key_values.{i}.{part}": [batch, 2, past, 16] for i in range(2) for part in ("key", "value")}
    model = graph(attention_mask=[batch, total], **caches, position_ids=[batch, tokens], input_ids=[batch, tokens])
    axes = SIZES.axes(model)
    assert axes["attention_mask"] == ("batch", "total")
    assert axes["input_ids"] == axes["position_ids"] == ("batch", "tokens")
    assert {axes[name] for name in caches} == {("batch", 2, "past", 16)}
    assert SIZES.dimensions(model) == {"batch", "tokens", "past"}


def test_a_mask_of_the_new_tokens_alone() -> None:
    model = graph(input_ids=["N", "T"], attention_mask=["N", "T"], **{"past_key_values.0.key": ["N", 1, "P", 4]})
    assert SIZES.axes(model)["attention_mask"] == ("batch", "tokens")


def test_a_file_for_single_steps() -> None:
    model = graph(input_ids=["N", 1], attention_mask=["N", "P + 1"], **{"past_key_values.0.key": ["N", 1, "P", 4]})
    shapes = SIZES.shapes_at(model, {"batch": 3, "tokens": 9, "past": 5})
    assert shapes == {"input_ids": (3, 1), "attention_mask": (3, 6), "past_key_values.0.key": (3, 1, 5, 4)}


@pytest.mark.parametrize("name", ["head_width", "heads * 2", "a: b, {c}", "past_key_values.0.key.3", None])
def test_the_hint_for_a_dimension_can_be_followed(name: str | None) -> None:
    """It is YAML whatever the name holds, and with it the dimension has a range."""
    model = graph(input_ids=["N", "T"], **{"past_key_values.0.key": ["N", 2, "P", name]})
    with pytest.raises(RecipeError, match="no range") as caught:
        SIZES.axes(model)
    text = re.search("`(.*)`", str(caught.value.hint)).group(1).replace("[min, opt, max]", "[4, 4, 8]")
    dims = yaml.safe_load(text)["dims"]
    assert list(dims) == [name or "past_key_values.0.key.3"]
    shapes = Workload.model_validate({"dims": dims}).shapes(model)
    assert [shape[3] for shape in shapes["past_key_values.0.key"]] == [4, 4, 8]


def test_the_default_range_ends_where_the_model_does() -> None:
    declared = Workload(tokens=(4, 8, 99))
    assert declared.fitting(50) == declared
    assert Workload().fitting(None) == Workload().fitting(1000) == Workload()
    assert [Workload().fitting(longest).tokens for longest in (60, 20, 5)] == [(8, 48, 60), (8, 20, 20), (5, 5, 5)]


@pytest.mark.parametrize("sizes", [(8, 4, 16), (1, 20, 16), (0, 1, 2), (-1, -1, -1), 0])
@pytest.mark.parametrize("field", ["batch", "tokens"])
def test_impossible_sizes_are_refused_by_name(field: str, sizes: object) -> None:
    with pytest.raises(RecipeError, match=rf"workload\.{field}.*min <= opt <= max"):
        Workload.model_validate({field: sizes})


def test_a_dimension_that_the_model_lacks_is_refused(tmp_path):
    path = zoo.exported("bert")
    with pytest.raises(RecipeError, match="the model has no dimension 'boxes'; its inputs have: batch, tokens"):
        compile_model(path, {"passes": [], "workload": {"dims": {"boxes": 3}}}, tmp_path / "build")
    assert list(tmp_path.iterdir()) == []


def test_a_size_is_no_truth():
    with pytest.raises(RecipeError, match=r"workload\.batch: should be a list, not true"):
        load_recipe({"workload": {"batch": True}})


def test_impossible_dims_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"workload\.dims\.boxes"):
        Workload(dims={"boxes": (3, 2, 1)})
    with pytest.raises(RecipeError, match="key of its own"):
        Workload(dims={"batch": (1, 2, 3)})
    with pytest.raises(RecipeError, match="past and tokens together"):
        Workload(dims={"total": (1, 2, 3)})
    with pytest.raises(RecipeError, match="0 <= min"):
        Workload(past=(-1, 2, 3))


@pytest.mark.parametrize("bad", [{"batch": (1, 2)}, {"tokens": "many"}, {"sequence": 4}, {"dims": 3}])
def test_what_is_no_workload_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Workload.model_validate(bad)


def test_an_input_without_a_shape_is_refused() -> None:
    with pytest.raises(RecipeError, match="'x' has no shape"):
        SIZES.axes(graph(x=None))


@pytest.mark.parametrize(
    ("workload", "cached", "tokens"),
    [
        ({"batch": 4, "tokens": [1, 16, 32]}, False, 64),
        ({"batch": [1, 2, 4], "tokens": [1, 16, 32], "past": [0, 8, 16]}, True, 2),
        ({"batch": [1, 2, 4], "tokens": [1, 1, 32]}, True, 2),
        ({"batch": [1, 2, 4], "tokens": [8, 16, 32]}, True, 1),
        ({}, True, 1),
    ],
)
def test_a_decoder_is_to_be_fast_at_its_steps(workload: dict[str, Any], cached: bool, tokens: int) -> None:
    assert Workload.model_validate(workload).tokens_of_call(cached=cached) == tokens


def test_images_have_as_many_tokens_as_they_have() -> None:
    assert Workload(batch=(1, 2, 4)).tokens_of_call(cached=False, fixed=197) == 394
    assert find_anatomy(canonical(zoo.exported("vit"))).fixed_tokens == 10
    assert find_anatomy(canonical(zoo.exported("bert"))).fixed_tokens is None
