"""Where the sparse form stops paying: the arithmetic, and what passes make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zoo
from rewrite import canonical, profile_of
from routes import profile_with, random_routers
from seeds import seeded

from trimtab.passes import Capability, Pass, PassContext, PassResult, run_passes
from trimtab.passes.crossover import Call, Crossover, Load, SparseShape, limit
from trimtab.passes.dynamic_int8 import DynamicInt8
from trimtab.passes.ffn_route.route import FFNRoute
from trimtab.passes.ffn_route.routers import Routers
from trimtab.passes.ffn_threshold.threshold import FFNThreshold
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.head_topk.topk import HeadTopK
from trimtab.passes.sparse_ffn import RestOption
from trimtab.passes.weight_only import WeightOnly

TIMES = Crossover(dense=1.0, fixed=0.1, full=2.0, together=((1, 2.1), (2, 2.2), (4, 2.4), (8, 2.8)))


def test_one_token_pays_up_to_the_density_where_sparse_is_faster() -> None:
    """By 5 % at least: less is lost in the noise of the measure."""
    assert TIMES.sparse(TIMES.max_density()) == pytest.approx(0.95 * TIMES.dense)
    assert TIMES.sparse(TIMES.max_density(1.0)) + 0.25 * TIMES.dense == pytest.approx(0.95 * TIMES.dense)  # 4 bytes
    int8 = replace(TIMES, form="int8-rows")
    assert int8.sparse(int8.max_density(0.25)) + 0.25 * int8.dense == pytest.approx(0.95 * int8.dense)
    assert Crossover(1.0, 1.5, 2.0, TIMES.together).max_density() == 0
    assert Crossover(9.0, 0.1, 2.0, TIMES.together).max_density() == 1


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


def test_the_union_of_a_call_is_that_of_tokens_drawn_at_random() -> None:
    rng = seeded()
    chosen = rng.random((400, 50)) < rng.random(50) ** 3
    tokens = int(rng.integers(2, 9))
    drawn = chosen[rng.integers(0, len(chosen), (6000, tokens))].any(1).mean()
    found = Load.of_call(chosen.mean(0), tokens)
    assert found.union == pytest.approx(drawn, abs=0.02)
    assert found.density == pytest.approx(chosen.mean())
    assert Load.of_call(chosen.mean(0), tokens, shared=True) == Load(tokens, found.union, found.union)
    assert Load.of_call(chosen.mean(0), tokens, dense_above=tokens) == found
    assert Load.of_call(chosen.mean(0), tokens, dense_above=tokens - 1) == Load(tokens, 1, 1, whole=True)
    one = Load.of_call(chosen.mean(0), 1)
    assert one.union == pytest.approx(one.density)


def test_a_call_is_judged_by_what_its_tokens_read_and_compute() -> None:
    call = Call(8, dense=4.0, whole=3.5, fixed=0.5, read=1.5, each=3.0)
    found = replace(TIMES, call=call)
    assert found.not_faster("its neurons", Load(8, 0.5, 0.9)) is None  # 0.5 + 1.35 + 1.5
    assert found.not_faster("its neurons", Load(8, 0.62, 1.0)) is not None  # 3.86: as fast, but for noise
    why = found.not_faster("its neurons", Load(20, 0.5, 1.0), 0.4)  # 3.5, and 0.4 for the choice
    assert why is not None
    assert "50% of its neurons for each token, 100% for any of 20," in why
    assert "calls of 20 tokens (batch × tokens of the workload), timed with 8" in why
    assert why.endswith("3.500 ms without the choice, beside 4.000 ms")
    assert found.not_faster("its neurons", Load(8, 1, 1, whole=True)) is None
    assert "all of its neurons, which" in str(found.not_faster("its neurons", Load(8, 1, 1, whole=True), 0.4))
    assert TIMES.not_faster("its neurons", Load(1, 0.42, 0.42)) is None
    assert "42% of its neurons and the choice" in str(TIMES.not_faster("its neurons", Load(1, 0.42, 0.42), 0.1))


def run(
    step: Pass, shapes: list[SparseShape], found: Crossover, folder: Path, shards: int = 1, behind: Sequence[Pass] = (),
    tokens: int = 1,
) -> PassResult:  # fmt: skip
    graph = canonical(zoo.exported("llama"))
    profile = profile_of(graph)
    profile.set_head(np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32))

    def measure(shape: SparseShape) -> Crossover:
        shapes.append(shape)
        return replace(found, form=shape.dense)

    context = PassContext(profile, Capability(row_scales=True), crossover=measure, shards=shards, tokens=tokens)
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
    assert "are not faster than the dense form: for one token, measured" in result.left[0].why
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
    assert "are not faster than the dense form" in result.left[0].why
    result = run(HeadTopK(take=20, rank=4, most=0.1), [], TIMES, tmp_path)
    assert "15% of its rows would be computed, more than 10%" in result.left[0].why
    assert run(HeadTopK(take=20, rank=4), [], TIMES, tmp_path).changed == 1
    assert nodes(tmp_path, "SelectBlocks") == [TIMES.dense_above(20 / 131)]


@pytest.mark.parametrize(
    ("step", "layers"),
    [
        (FFNTopK(density=0.2, recall=0.5, rank=16, dense_above=64), 2),
        (FFNThreshold(sparsity=0.5), 2),
        (HeadTopK(take=20, rank=16, dense_above=64), 1),
    ],
)
def test_what_pays_for_a_token_may_not_for_several(step: Pass, layers: int, tmp_path: Path) -> None:
    """A call of 16 tokens, each with rows of its own, reads nearly all."""
    cheap = Crossover(1.0, 0.1, 0.5, TIMES.together)
    reads = replace(cheap, call=Call(16, dense=1.0, whole=0.1, fixed=0.3, read=1.0, each=0.0))
    computes = replace(cheap, call=Call(16, dense=9.0, whole=99.0, fixed=0.3, read=1.0, each=8.0))
    shapes: list[SparseShape] = []
    assert run(step, shapes, cheap, tmp_path).changed == layers
    assert {shape.tokens for shape in shapes} == {1}
    shapes.clear()
    result = run(step, shapes, reads, tmp_path, tokens=16)
    assert {shape.tokens for shape in shapes} == {16}
    assert result.changed == 0
    assert "for calls of 16 tokens" in result.left[0].why
    assert not nodes(tmp_path, "SelectBlocks")
    assert run(step, [], computes, tmp_path, tokens=16).changed == layers


def test_calls_that_compute_everything_are_judged_so(tmp_path: Path) -> None:
    step = FFNTopK(density=0.2, recall=0.5, rank=16, dense_above=8)
    slow = replace(TIMES, call=Call(8, dense=1.0, whole=1.2, fixed=0.1, read=0.2, each=0.4))
    assert run(step, [], slow, tmp_path, tokens=8).changed == 2
    assert "all of its neurons, which so many tokens compute" in run(step, [], slow, tmp_path, tokens=9).left[0].why
    assert run(step, [], replace(slow, call=replace(slow.call, whole=0.3)), tmp_path, tokens=9).changed == 2


@pytest.mark.parametrize(
    "step", [FFNTopK(density=0.2, recall=0.5, rank=8), FFNThreshold(sparsity=0.5), FFNRoute(router="fitted", group=4)]
)
def test_what_stands_for_the_rest_is_counted(step: Pass, tmp_path: Path) -> None:
    """A map of rank 64 has two fifths of the weights of such an FFN."""
    cheap = Crossover(1.0, 0.45, 0.4, TIMES.together)
    assert run(step, [], cheap, tmp_path).changed == 2
    with_rest = step.model_copy(update={"rest": RestOption(rank=64)})
    slow = run(with_rest, [], cheap, tmp_path)
    assert slow.changed == 0
    assert "measured" in slow.left[0].why


@pytest.mark.parametrize("alike", [True, False])
def test_routers_that_choose_alike_pay_for_more_tokens(alike: bool) -> None:
    """By the states of the Profile: half of the groups, the same of each token, or others."""
    rng, graph = seeded(), canonical(zoo.exported("llama"))
    learned, states = random_routers(graph, rng, threshold=0.5), profile_of(graph).tensors
    for layer in range(2):
        weight, bias = (learned[f"router.{layer}.{part}"] for part in ("weight", "bias"))
        if alike:
            weight[:], bias[:] = 0, np.where(np.arange(len(bias)) % 2, 3, -3)
        else:
            bias[:] = -np.median(states[f"ffn.{layer}.states"] @ weight.T, 0)
    profile = profile_with(learned, **states)
    call = Call(32, dense=1.0, whole=9.0, fixed=0.0, read=1.2, each=0.0)
    context = PassContext(profile, tokens=32, crossover=lambda shape: replace(TIMES, call=call))
    (result,) = run_passes(graph, [FFNRoute()], context)
    assert result.changed == (2 if alike else 0)
    routers = Routers.of(profile.learned("lte"))
    for layer, router in routers.by_layer.items():
        share = routers.chosen(router.scores(states[f"ffn.{layer}.states"]), 0.5).mean()
        assert share == pytest.approx(0.5, abs=0.26)


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
