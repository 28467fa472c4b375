from __future__ import annotations

import numpy as np
import pytest
import zoo
from seeds import seeded

from trimtab.compiler.checks.compare import compare
from trimtab.compiler.checks.consistency import batch_consistency
from trimtab.compiler.checks.corners import corners
from trimtab.compiler.checks.measure import OutputError
from trimtab.compiler.checks.peers import open_peer
from trimtab.compiler.checks.validate import Limits, broken, check_numbers, worst
from trimtab.compiler.workload import Workload
from trimtab.passes.graph import load_graph

WORKLOAD = Workload(batch=(1, 3, 5), tokens=(8, 12, 24))
DIMS = {"batch": 3, "tokens": 12}


@pytest.fixture(scope="module", params=["bert", "distilbert", "vit", "gpt2"])
def model(request):
    path = zoo.exported(request.param)
    return open_peer("dense-fp32", path, 1), load_graph(path)


def rng():
    return np.random.default_rng(0)


def changed(run, change):
    """`run` with its outputs passed through `change(name, value, feeds)`."""
    return lambda feeds: {name: change(name, value.copy(), feeds) for name, value in run(feeds).items()}


def test_a_model_equals_itself_at_every_corner(model):
    run, graph = model
    comparisons, consistency = check_numbers(run, run, graph, WORKLOAD)
    masked = any(tensor.name == "attention_mask" for tensor in graph.inputs)
    assert len(comparisons) == len(corners(graph, WORKLOAD)) * (2 if masked else 1)
    for each in comparisons:
        assert (each.max_abs, each.mean_abs, each.relative_l2, each.fault) == (0, 0, 0, None)
        assert each.cosine == pytest.approx(1)
    assert consistency
    assert all(pair.passed and pair.difference < 1e-4 for pair in consistency)
    limits = Limits(max_error=0)
    assert not list(broken(comparisons, consistency, None, limits))


def test_a_fault_at_one_corner_is_found_there(model):
    run, graph = model
    bad = changed(run, lambda name, value, feeds: value * (1.5 if len(value) == 5 else 1))
    comparisons, consistency = check_numbers(run, bad, graph, WORKLOAD)
    for each in comparisons:
        assert each.relative_l2 == pytest.approx(0.5 if each.dims["batch"] == 5 else 0, abs=1e-6)
        assert each.cosine == pytest.approx(1)
    assert all(each.dims["batch"] == 5 for each in worst(comparisons))
    (failure,) = broken(comparisons, consistency, None, Limits(max_error=0.4))
    assert "batch 5" in failure
    assert "0.5" in failure
    assert not list(broken(comparisons, consistency, None, Limits(max_error=0.6)))


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_nan_and_inf_fail_without_a_limit(model, value, said):
    run, graph = model

    def poison(name, output, feeds):
        if len(output) == 5:
            output[0, -1] = value
        return output

    comparisons, consistency = check_numbers(run, changed(run, poison), graph, WORKLOAD)
    failures = list(broken(comparisons, consistency, None, Limits()))
    assert failures
    for failure in failures:
        assert f"the compiled model gives {said}" in failure
        assert "batch 5" in failure
    comparisons, _ = check_numbers(changed(run, poison), run, graph, WORKLOAD)
    assert "the dense model gives" in next(broken(comparisons, [], None, Limits()))


def test_missing_and_misshapen_outputs(model):
    run, graph = model
    (name,) = (tensor.name for tensor in graph.outputs)
    (gone,) = compare(run, lambda feeds: {"other": np.zeros(1)}, graph, DIMS, rng(), padded=False)
    assert gone.output == name
    assert "does not have this output" in gone.fault
    (cut,) = compare(run, changed(run, lambda name, value, _: value[:1]), graph, DIMS, rng(), padded=False)
    assert "shape [1," in cut.fault
    assert worst([OutputError(output=name, dims={}, padded=False, relative_l2=9.0), cut]) == (cut,)


def test_errors_by_hand():
    graph = load_graph(zoo.exported("bert"))
    dense, found = np.array([[3.0, 4.0, 0.0]]), np.array([[3.0, 4.0, 2.0]], np.float32)
    (each,) = compare(
        lambda _: {"y": dense}, lambda _: {"y": found}, graph, {"batch": 1, "tokens": 8}, rng(), padded=False
    )
    assert (each.max_abs, each.mean_abs, each.relative_l2) == pytest.approx((2, 2 / 3, 2 / 5))
    assert each.cosine == pytest.approx(25 / (5 * np.sqrt(29)))


@pytest.mark.parametrize("dtype", [object, "U8", "S8"])
def test_texts_are_equal_or_a_fault(dtype):
    """As the class names are that some files answer with, and tokens, of which padding does not count."""
    graph, random = load_graph(zoo.exported("distilbert")), seeded()
    answer = {
        "names": np.array(["cat", "dog", "owl"], dtype)[random.integers(0, 3, 3)],
        "last_hidden_state": np.array(["a", "b"], dtype)[random.integers(0, 2, (3, 12))],
    }

    def renamed(name):
        def run(feeds):
            where = (feeds["attention_mask"] == 0) if name == "padding" else ...
            key = "names" if name == "names" else "last_hidden_state"
            other = answer[key].copy()
            other[where] = np.array(["x"], dtype)[0]
            return answer | {key: other}

        return run

    def check(run):
        workload = Workload(batch=(3, 3, 3), tokens=(12, 12, 12))
        comparisons, consistency = check_numbers(lambda _: answer, run, graph, workload)
        assert [each for each in comparisons if each.padded]
        return list(broken(comparisons, consistency, None, Limits(max_error=0)))

    assert not check(lambda _: answer)
    for key, says in (("names", "3 of 3 texts"), ("last_hidden_state", "of 36 texts")):
        failures = check(renamed(key))
        assert failures and all("texts are not the dense model's" in each for each in failures)
        assert any(says in each for each in failures)
    assert not check(renamed("padding"))


def test_rows_whose_number_depends_on_values_are_not_those_of_samples():
    """As NonZero has them: the rows of a batch are not its samples', even where their number is the batch's."""
    graph = load_graph(zoo.exported("distilbert"))
    widths = iter((7, 5, 3, 9, 8, 6, 4, 2) * 9)

    def run(feeds):
        return {"last_hidden_state": np.ones((len(feeds["input_ids"]), next(widths)))}

    assert batch_consistency(run, run, graph, WORKLOAD, {"batch": 3, "tokens": 8}, rng()) == []


def test_padded_tokens_do_not_count():
    path = zoo.exported("distilbert")
    run, graph = open_peer("dense-fp32", path, 1), load_graph(path)

    def spoil(at):
        def change(name, value, feeds):
            value[feeds["attention_mask"] == at] += 7
            return value

        return changed(run, change)

    assert compare(run, spoil(0), graph, DIMS, rng(), padded=True)[0].max_abs == 0
    assert compare(run, spoil(1), graph, DIMS, rng(), padded=True)[0].max_abs == pytest.approx(7, abs=1e-4)


def test_an_engine_that_gets_only_row_0_right_is_caught(model):
    run, graph = model
    bad = changed(run, lambda name, value, feeds: np.repeat(value[:1], len(value), 0))
    for consistent, model_run in ((True, run), (False, bad)):
        found = batch_consistency(run, model_run, graph, WORKLOAD, DIMS, rng())
        assert [pair.passed for pair in found] == [consistent]
    assert "differs from itself alone" in next(broken([], found, None, Limits()))


def test_rounding_that_depends_on_the_batch_is_no_fault():
    path = zoo.exported("bert")
    dense, int8 = open_peer("dense-fp32", path, 1), open_peer("dense-int8", path, 1)
    found = batch_consistency(dense, int8, load_graph(path), WORKLOAD, DIMS, rng())
    assert [pair.passed for pair in found] == [True]
    assert found[0].difference > 1e-4  # it does depend on it


def test_an_engine_is_never_given_fewer_samples_than_it_takes():
    path = zoo.exported("bert")
    run, graph = open_peer("dense-fp32", path, 1), load_graph(path)
    sizes = []

    def recording(feeds):
        sizes.append(len(feeds["input_ids"]))
        return run(feeds)

    workload = Workload(batch=(2, 4, 6), tokens=(8, 8, 8))
    (pair,) = batch_consistency(run, recording, graph, workload, {"batch": 6, "tokens": 8}, rng())
    assert set(sizes) == {2, 6}
    assert pair.difference < 1e-4


def test_corners_are_those_of_the_models_own_dimensions():
    assert corners(load_graph(zoo.exported("vit")), WORKLOAD) == [{"batch": 1}, {"batch": 3}, {"batch": 5}]
    assert {"batch": 5, "tokens": 8} in corners(load_graph(zoo.exported("bert")), WORKLOAD)
