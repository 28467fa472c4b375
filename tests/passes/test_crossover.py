"""Where the sparse form stops paying: the arithmetic, and what passes make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from rewrite import canonical, profile_of

from trimtab.passes import Capability, Pass, PassContext, PassResult, run_passes
from trimtab.passes.crossover import Crossover, SparseShape, limit
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.head_topk.topk import HeadTopK
from trimtab.passes.weight_only import WeightOnly

TIMES = Crossover(dense=1.0, fixed=0.1, full=2.0, together=((1, 2.1), (2, 2.2), (4, 2.4), (8, 2.8)))


def test_one_token_pays_up_to_the_density_where_both_take_as_long() -> None:
    assert TIMES.sparse(TIMES.most()) == pytest.approx(TIMES.dense)
    assert TIMES.sparse(TIMES.most(1.0)) + 0.25 * TIMES.dense == pytest.approx(TIMES.dense)  # of four bytes a weight
    int8 = replace(TIMES, form="int8-rows")
    assert int8.sparse(int8.most(0.25)) + 0.25 * int8.dense == pytest.approx(int8.dense)
    assert Crossover(1.0, 1.5, 2.0, TIMES.together).most() == 0
    assert Crossover(9.0, 0.1, 2.0, TIMES.together).most() == 1


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.31, 0.5, 1.0])
def test_more_tokens_pay_until_all_rows_together_are_faster(density: float) -> None:
    """Against a search over every number of tokens."""
    tokens, times = zip(*TIMES.together, strict=True)
    slower = [n for n in range(1, 9) if TIMES.sparse(density, n) > np.interp(n, tokens, times)]
    found = TIMES.dense_above(density)
    if slower:
        assert found == max(1, slower[0] - 1)
    else:
        assert found >= 8
    assert limit(TIMES, density) == found
    assert limit(None, density) == max(1, int(0.8 / density))


def run(
    step: Pass, shapes: list[SparseShape], found: Crossover, folder: Path, shards: int = 1, behind: Sequence[Pass] = ()
) -> PassResult:
    graph = canonical(zoo.exported("llama"))
    profile = profile_of(graph)
    profile.set_head(np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32))

    def measure(shape: SparseShape) -> Crossover:
        shapes.append(shape)
        return replace(found, form=shape.dense)

    context = PassContext(profile, Capability(row_scales=True), crossover=measure, shards=shards)
    result = run_passes(graph, [step, *behind], context)[0]
    save_graph(graph, folder / "out.onnx")
    return result


def nodes(folder: Path, op: str) -> list[int]:
    return [node.attrs["dense_above"] for node in load_graph(folder / "out.onnx").nodes if node.op == op]


def test_an_ffn_that_would_be_slower_stays_dense(tmp_path: Path) -> None:
    shapes: list[SparseShape] = []
    few = Crossover(1.0, 0.9, 2.0, TIMES.together)  # up to 5 %
    result = run(FFNTopK(density=0.2, recall=0.5, rank=16), shapes, few, tmp_path)
    assert set(shapes) == {SparseShape(108, 64, 3, "fp32", 1, 2)}
    assert result.changed == 0
    assert "take longer than all: for one token, measured" in result.left[0].why
    assert not nodes(tmp_path, "SelectBlocks")


def test_an_ffn_that_needs_more_than_pays_for_its_recall_stays_dense(tmp_path: Path) -> None:
    few = Crossover(1.0, 0.5, 2.0, TIMES.together)  # up to 25 %, less the predictor
    result = run(FFNTopK(density=0.05, recall=1.0, rank=2), [], few, tmp_path)
    assert result.changed == 0
    assert "of the wanted ones, not 100%" in result.left[0].why


def test_what_is_asked_for_needs_no_measuring(tmp_path: Path) -> None:
    shapes: list[SparseShape] = []
    never = Crossover(1.0, 9.0, 9.0, TIMES.together)
    assert run(FFNTopK(density=0.2, most=1.0, recall=0.5, rank=16, dense_above=7), shapes, never, tmp_path).changed == 2
    assert nodes(tmp_path, "SelectBlocks") == [7, 7]
    assert run(HeadTopK(take=20, rank=16, most=1.0, dense_above=5), shapes, never, tmp_path).changed == 1
    assert nodes(tmp_path, "SelectBlocks") == [5]
    assert not shapes


def test_calls_go_the_dense_way_where_that_was_measured_to_be_faster(tmp_path: Path) -> None:
    result = run(FFNTopK(density=0.2, most=1.0, take=0.5, rank=16), [], TIMES, tmp_path)
    wanted = TIMES.dense_above(54 / 108)
    assert nodes(tmp_path, "SelectBlocks") == [wanted, wanted]
    assert [row["dense_above"] for row in result.details["layers"]] == [wanted, wanted]


def test_in_shards_each_rank_times_its_own_part(tmp_path: Path) -> None:
    shapes: list[SparseShape] = []
    run(FFNTopK(density=0.2, recall=0.5, rank=16), shapes, TIMES, tmp_path, shards=2)
    run(HeadTopK(take=20, rank=16), shapes, TIMES, tmp_path, shards=2)
    assert set(shapes) == {SparseShape(54, 64, 3, "fp32", 1, 2), SparseShape(131, 64, 1, "fp32")}  # 131 stay whole


def test_a_head_that_would_be_slower_stays_dense(tmp_path: Path) -> None:
    shapes: list[SparseShape] = []
    result = run(HeadTopK(take=20, rank=16), shapes, Crossover(1.0, 0.9, 2.0, TIMES.together), tmp_path)
    assert shapes == [SparseShape(131, 64, 1, "fp32")]
    assert result.changed == 0
    assert "take longer than all" in result.left[0].why
    result = run(HeadTopK(take=20, rank=4, most=0.1), [], TIMES, tmp_path)
    assert "15% of its rows would be computed, more than 10%" in result.left[0].why
    assert run(HeadTopK(take=20, rank=4), [], TIMES, tmp_path).changed == 1
    assert nodes(tmp_path, "SelectBlocks") == [TIMES.dense_above(20 / 131)]


INT8, BLOCKS = DynamicInt8(scales="auto"), WeightOnly(bits=4)


@pytest.mark.parametrize(
    ("behind", "ffn", "head"),
    [
        ([], "fp32", "fp32"),
        ([INT8], "int8-rows", "int8-rows"),
        ([DynamicInt8(scales="tensor")], "int8", "int8"),
        ([BLOCKS], "int4-blocks", "int4-blocks"),
        ([WeightOnly(bits=8, parts=("ffn",)), INT8], "int8-blocks", "int8-rows"),
    ],
)
def test_sparse_layers_stand_beside_what_later_passes_would_make_of_dense_ones(
    behind: list[Pass], ffn: str, head: str, tmp_path: Path
) -> None:
    shapes: list[SparseShape] = []
    run(FFNTopK(density=0.2, recall=0.5, rank=16), shapes, TIMES, tmp_path, behind=behind)
    assert {shape.dense for shape in shapes} == {ffn}
    shapes.clear()
    run(HeadTopK(take=20, rank=16), shapes, TIMES, tmp_path, behind=behind)
    assert {shape.dense for shape in shapes} == {head}


def test_the_report_says_in_which_form_dense_is_faster(tmp_path: Path) -> None:
    few = Crossover(1.0, 0.9, 2.0, TIMES.together)
    result = run(FFNTopK(density=0.2, recall=0.5, rank=16), [], few, tmp_path, behind=[INT8])
    assert result.changed == 0
    assert result.left[0].why.endswith("beside 1.000 ms in int8-rows")
