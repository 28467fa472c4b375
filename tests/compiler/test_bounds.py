"""Default bounds beside ruined builds that agree by chance, and beside the noise of int8, which nobody is warned of."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.compiler.checks.bounds import large_errors, poor_quality
from trimtab.compiler.checks.consistency import Consistency
from trimtab.compiler.checks.kinds.decisions import compare_decisions
from trimtab.compiler.checks.measure import OutputError
from trimtab.compiler.checks.quality import measure_quality
from trimtab.compiler.checks.validate import Limits, broken
from trimtab.compiler.task import Task

COUNT = 400
SEVERAL, CLASSES, TOKENS = (
    Task("labels", "y", "sigmoid"), Task("classes", "y", "softmax"), Task("tokens", "y", "softmax"),
)  # fmt: skip
RERANKER, REGRESSION, EMBEDDING = Task("score", "y", "sigmoid"), Task("score", "y"), Task("embedding", "y")


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def _warnings(task: Task, dense: np.ndarray, compiled: np.ndarray, labels: np.ndarray | None = None) -> str:
    quality = measure_quality([{}], lambda _: {"y": dense}, lambda _: {"y": compiled}, labels, task=task)
    assert quality.model_dump_json() and quality.lines()
    return " ".join(poor_quality(quality, "the first"))


def _logits(rng: np.random.Generator, shares: list[float], *shape: int) -> np.ndarray:
    """Logits [*shape, classes] whose argmax is of each class for its share of the rows."""
    chosen = rng.choice(len(shares), shape, p=shares)
    return 4.0 * np.eye(len(shares))[chosen] + rng.normal(0, 0.7, (*shape, len(shares)))


def _noisy(rng: np.random.Generator, y: np.ndarray, size: float = 0.02) -> np.ndarray:
    """`y` with noise of `size` of its spread, as dense int8 leaves it."""
    return y + rng.normal(0, size * y.std(), y.shape)


def _several(rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random((COUNT, 30)) < 0.03, 3.0, rng.normal(-4, 1, (COUNT, 30)))


def _shared(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What embeddings of texts have of their own, and a direction that all share."""
    return rng.normal(size=(COUNT, 64)), 5 * rng.normal(size=64)


def test_labels_that_are_never_given(rng: np.random.Generator) -> None:
    dense = _several(rng)
    assert "kappa" in _warnings(SEVERAL, dense, np.full_like(dense, -5))
    one = dense.copy()
    dense[:, 4], one[:, 4] = np.where(np.arange(COUNT) < 40, 3, -4), -4  # a label of 10 % of the samples
    assert "F1 of class '4'" in _warnings(SEVERAL, dense, one)
    assert not _warnings(SEVERAL, dense, _noisy(rng, dense))


@pytest.mark.parametrize("task", [TOKENS, CLASSES])
def test_rare_classes_that_are_never_predicted(task: Task, rng: np.random.Generator) -> None:
    shape = (50, 20) if task is TOKENS else (COUNT,)
    dense = _logits(rng, [0.94, *[0.06 / 8] * 8], *shape)
    assert "kappa" in _warnings(task, dense, np.broadcast_to(np.eye(9)[0], dense.shape))
    assert not _warnings(task, dense, _noisy(rng, dense))


def test_a_class_that_vanishes(rng: np.random.Generator) -> None:
    for shares in ([0.9, 0.1], [0.45, 0.47, 0.08], [0.16, *[0.12] * 7]):
        dense = _logits(rng, shares, COUNT)
        last = dense.shape[1] - 1
        gone = dense - 9 * np.eye(last + 1)[last]
        for labels in (None, rng.integers(0, last + 1, COUNT)):
            assert f"F1 of class '{last}'" in _warnings(CLASSES, dense, gone, labels)
            assert not _warnings(CLASSES, dense, _noisy(rng, dense), labels)


@pytest.mark.parametrize("task", [RERANKER, REGRESSION])
def test_scores_of_the_right_ranks_and_the_wrong_size(task: Task, rng: np.random.Generator) -> None:
    dense = rng.normal(0, 1, (COUNT, 1))
    for compiled in (dense - 10, 0.3 * dense, dense / 2 + 1):
        assert "standard deviations" in _warnings(task, dense, compiled)
    assert not _warnings(task, dense, _noisy(rng, dense, 0.1))
    assert not _warnings(task, np.ones_like(dense), np.ones_like(dense))


def test_embeddings_of_a_shared_direction(rng: np.random.Generator) -> None:
    own, shared = _shared(rng)
    assert "similarities" in _warnings(EMBEDDING, own + shared, rng.normal(size=own.shape) + shared)
    assert "similarities" in _warnings(EMBEDDING, own + shared, np.tile(shared, (COUNT, 1)))
    assert not _warnings(EMBEDDING, own + shared, own + shared + rng.normal(0, 0.1, own.shape))
    assert not _warnings(EMBEDDING, own, own + rng.normal(0, 0.12, own.shape))  # a mean cosine of 0.993


def test_few_samples_are_no_evidence(rng: np.random.Generator) -> None:
    dense = _logits(rng, [1.0, 0.0], 60)
    dense[0] = [0, 4]
    assert not _warnings(CLASSES, dense, np.broadcast_to([4.0, 0], dense.shape))  # one sample of 60
    own = rng.normal(size=(4, 8))
    assert "similarities" not in _warnings(EMBEDDING, own, rng.normal(size=own.shape))


def test_kappa_and_f1_against_scikit_learn(rng: np.random.Generator) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    dense = rng.choice(5, 300, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    compiled = np.where(rng.random(300) < 0.8, dense, rng.integers(0, 5, 300))
    found = compare_decisions(dense, compiled, list("abcde"))
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score(dense, compiled), rel=1e-12)
    assert found.worst_class is not None
    scores = metrics.f1_score(dense, compiled, average=None)
    assert found.worst_f1 == pytest.approx(scores["abcde".index(found.worst_class)], rel=1e-12)
    assert found.kappa < found.kappa_upper < 1 and found.worst_f1 < found.worst_f1_upper
    same = compare_decisions(np.zeros((4, 2), bool), np.zeros((4, 2), bool))
    assert (same.kappa, same.worst_class) == (1.0, None)


def test_one_line_for_a_cache_of_many_layers() -> None:
    """Whatever is wrong with keys and values of all layers, the worst of them is named, and how many they are."""
    worst, dims = "present.5.value", {"batch": 2, "tokens": 3}
    names = ["logits", *(f"present.{layer}.{part}" for layer in range(9) for part in ("key", "value"))]
    errors = [
        OutputError(output=name, dims=dims, padded=False, relative_l2=4.0 if name == worst else 3.0, rms=1.0)
        for name in names
    ]
    apart = [
        Consistency(output=name, dims=dims, difference=0.4 if name == worst else 0.3, allowed=0.01) for name in names
    ]
    faults = [OutputError(output=name, dims=dims, padded=False, fault="shape [1]") for name in names]
    for lines in (
        list(large_errors(errors)),
        list(broken(errors, [], None, Limits(max_error=0.1))),
        list(broken([], apart, None, Limits())),
    ):
        assert len(lines) == 2 and "'logits'" in lines[0]
        assert f"'{worst}, the worst of 18 of the cache'" in lines[1]
    lines = list(broken(faults, [], None, Limits()))
    assert len(lines) == 2 and "the worst of 18 of the cache" in lines[1]
