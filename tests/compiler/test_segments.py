"""The one executor of segments: what goes where, exits that take samples out of a batch, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exits import EXITS, Exiting
from rewrite import session

from trimtab.compiler.targets.segmented.compaction import Compaction, Exit, Layout
from trimtab.compiler.targets.segmented.hook import Hook
from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.segmented.runner import SegmentedRunner
from trimtab.compiler.targets.segmented.segment import Segment, Values
from trimtab.compiler.targets.session_segment import BoundSession, SessionSegment
from trimtab.passes.errors import TargetError


def fresh_rng() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 31))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


class Function(Segment):
    """A function of arrays as a segment, that counts its calls."""

    def __init__(self, inputs: str, outputs: str, function: Callable[..., tuple[Any, ...]]) -> None:
        self.inputs, self.outputs, self.function = tuple(inputs.split()), tuple(outputs.split()), function
        self.calls = 0

    def run(self, feeds: Values) -> Values:
        assert tuple(feeds) == self.inputs
        self.calls += 1
        return dict(zip(self.outputs, self.function(*feeds.values()), strict=True))

    def host(self, value: Any) -> np.ndarray:
        return np.asarray(value)


def test_a_route_tells_what_is_handed_on_and_dropped() -> None:
    sides = [("ab", "xy"), ("xb", "zw"), ("zy", "o")]
    route = Route.of([(list(reads), list(makes)) for reads, makes in sides], ["a", "b"], ["o", "w"])
    assert [leg.gives for leg in route.legs] == [("x", "y"), ("z", "w"), ("o",)]
    assert [set(leg.drops) for leg in route.legs] == [{"a"}, {"x", "b"}, {"z", "y"}]
    assert [set(leg.live) for leg in route.legs] == [{"x", "y", "b"}, {"z", "y"}, set()]
    assert [leg.results for leg in route.legs] == [(), ("w",), ("o",)]


def test_what_is_done_between_keeps_what_it_reads() -> None:
    sides = [(["a"], ["x", "score", "unread"]), (["x"], ["o"])]
    plain = Route.of(sides, ["a", "offsets"], ["o"])
    assert plain.legs[0].gives == ("x",) and set(plain.legs[0].drops) == {"a", "score", "unread"}
    hooked = Route.of(sides, ["a", "offsets"], ["o"], between=[["score"], []], companions={"x": "offsets"})
    assert hooked.legs[0].gives == ("x", "score") and set(hooked.legs[0].drops) == {"a", "score", "unread"}
    assert set(hooked.legs[0].live) == {"x", "offsets"}


@pytest.mark.parametrize(
    ("sides", "says"),
    [
        ([(["a"], ["x"]), (["y"], ["o"])], "segment 1 reads 'y'"),
        ([(["a", "o"], ["x"]), (["x"], ["o"])], "segment 0 reads 'o'"),
        ([(["a"], ["x"])], "the model gives 'o'"),
    ],
)
def test_what_nothing_gives_is_named(sides: Any, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        Route.of(sides, ["a"], ["o"])


def test_tensors_are_let_go_when_nothing_reads_them() -> None:
    seen: list[set[str]] = []

    class Watch(Hook):
        def after(self, number: int, segment: Segment, values: Values) -> Values:
            seen.append(set(values))
            return values

    segments = [
        Function("a", "x y", lambda a: (a + 1, a + 2)),
        Function("x", "z", lambda x: (x * 2,)),
        Function("z y", "o", lambda z, y: (z + y,)),
    ]
    runner = SegmentedRunner(segments, ["a"], ["o"], hook=Watch())
    assert runner.run({"a": np.array([3])})["o"] == (3 + 1) * 2 + 3 + 2
    assert seen == [{"a", "x", "y"}, {"x", "y", "z"}, {"y", "z", "o"}]
    with pytest.raises(TargetError, match="takes the inputs a, not b"):
        runner.run({"b": np.array([3])})


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_exits_between_sessions_equal_a_loop_over_samples(family: str, tmp_path: Path) -> None:
    """A model cut behind two of its layers, whose samples leave where a head is sure: never, at once, or in between."""
    rng = fresh_rng()
    exiting = Exiting(family, tmp_path, rng)
    segments = [BoundSession(SessionSegment(session(path))) for path in exiting.parts]
    runner = SegmentedRunner(segments, exiting.inputs, ["logits"], hook=exiting.hook)
    plain = SegmentedRunner(segments, exiting.inputs, ["logits"])
    for batch, tokens in ((1, 5), (7, 9), (16, 3)):
        leave = rng.permutation(np.arange(batch) % (len(EXITS) + 1))  # somebody everywhere
        feeds = exiting.feeds(batch, tokens, leave)
        np.testing.assert_allclose(runner.run(feeds)["logits"], exiting.alone(feeds), rtol=0, atol=2e-5)
        whole = exiting.whole.run(["logits"], feeds)[0]
        np.testing.assert_allclose(plain.run(feeds)["logits"], whole, rtol=0, atol=2e-5)
        never = feeds | {"threshold": np.full((batch, len(EXITS)), 2, np.float32)}
        np.testing.assert_array_equal(runner.run(never)["logits"], plain.run(never)["logits"])


def test_calls_of_many_threads_leave_by_themselves(tmp_path: Path) -> None:
    """Each call has its own samples, of which each its own exit."""
    rng = fresh_rng()
    exiting = Exiting("bert", tmp_path, rng)
    segments = [BoundSession(SessionSegment(session(path))) for path in exiting.parts]
    runner = SegmentedRunner(segments, exiting.inputs, ["logits"], hook=exiting.hook)
    sizes = rng.integers(8, 25, (40, 2))
    asked = [exiting.feeds(batch, tokens, rng.integers(0, 3, batch)) for batch, tokens in sizes]
    wanted = [runner.run(feeds)["logits"] for feeds in asked]
    with ThreadPoolExecutor(8) as pool:
        for found, want in zip(pool.map(runner.run, asked), wanted, strict=True):
            np.testing.assert_allclose(found["logits"], want, rtol=0, atol=1e-5)


class Counted(SessionSegment):
    calls = 0

    def run(self, feeds: Values) -> Values:
        self.calls += 1
        return super().run(feeds)


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_nothing_runs_when_nobody_is_left(batch: int, tmp_path: Path) -> None:
    exiting = Exiting("bert", tmp_path, fresh_rng())
    segments = [Counted(session(path)) for path in exiting.parts]
    runner = SegmentedRunner(segments, exiting.inputs, ["logits"], hook=exiting.hook)
    feeds = {name: value[:batch] for name, value in exiting.feeds(5, 4, np.zeros(5)).items()}
    found = runner.run(feeds)["logits"]
    assert [segment.calls for segment in segments] == [1, 0, 0]
    np.testing.assert_array_equal(found, exiting.whole.run(["early.0"], feeds)[0])
    assert found.shape[0] == batch and found.dtype == np.float32


WIDTH, CLASSES = 5, 3


def spans(offsets: np.ndarray) -> list[slice]:
    return [slice(int(a), int(b)) for a, b in pairwise(offsets)]


class Packed:
    """A model over packed tokens: it mixes those of a sample, drops some of them, and lets samples leave twice."""

    def __init__(self, rng: np.random.Generator, numbered: bool) -> None:
        self.numbered = numbered
        self.mix = [rng.standard_normal((WIDTH, WIDTH)) for _ in range(3)]
        self.heads = [rng.standard_normal((WIDTH, CLASSES)) for _ in range(3)]

    def layer(self, number: int, x: np.ndarray) -> np.ndarray:
        return np.tanh((x + x.mean(0)) @ self.mix[number])

    def head(self, number: int, x: np.ndarray) -> np.ndarray:
        answer: np.ndarray = x[0] @ self.heads[number]
        return answer

    @staticmethod
    def kept(x: np.ndarray) -> np.ndarray:
        return np.flatnonzero((x[:, 0] > 0) | (np.arange(len(x)) == 0))

    def segments(self) -> list[Function]:
        def run(number: int, x: np.ndarray, offsets: np.ndarray, threshold: np.ndarray) -> tuple[Any, ...]:
            parts = [self.layer(number, x[span]) for span in spans(offsets)]
            early = np.array([self.head(number, part) for part in parts]).reshape(-1, CLASSES)
            stays = early.max(1, initial=-np.inf) < threshold[:, min(number, 1)]
            if number == 1:
                parts = [part[self.kept(part)] for part in parts]
            x = np.concatenate([np.zeros((0, WIDTH)), *parts])
            ends = np.cumsum([0, *map(len, parts)]).astype(offsets.dtype)
            return x, early, np.flatnonzero(stays) if self.numbered else stays, ends

        def first(*given: Any) -> tuple[Any, ...]:
            return run(0, *given)[:3]

        def second(*given: Any) -> tuple[Any, ...]:
            return run(1, *given)

        def last(x: np.ndarray, offsets: np.ndarray, scale: np.ndarray) -> tuple[Any, ...]:
            return (scale * np.array([self.head(2, self.layer(2, x[span])) for span in spans(offsets)]),)

        return [
            Function("x offsets threshold", "h0 early0 stays0", first),
            Function("h0 offsets threshold", "h1 early1 stays1 ends1", second),
            Function("h1 ends1 scale", "o", last),
        ]

    def alone(self, x: np.ndarray, threshold: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """What one sample is answered with."""
        for number in range(2):
            x = self.layer(number, x)
            if not (early := self.head(number, x)).max() < threshold[number]:
                return early
            x = x[self.kept(x)] if number == 1 else x
        return scale * self.head(2, self.layer(2, x))


LAYOUT = Layout(batched=frozenset(["threshold"]), packed={"h0": "offsets", "h1": "ends1"}, common=frozenset(["scale"]))


@pytest.mark.parametrize("numbered", [False, True], ids=["mask", "numbers"])
def test_packed_tokens_leave_with_their_sample(numbered: bool) -> None:
    """A tensor that is the same for all samples, here `scale`, goes on as it is; offsets are those of who is left."""
    rng = fresh_rng()
    for offsets_type in (np.int32, np.int64):
        model = Packed(rng, numbered)
        hook = Compaction([Exit(0, "stays0", {"o": "early0"}), Exit(1, "stays1", {"o": "early1"})], LAYOUT)
        runner = SegmentedRunner(model.segments(), ["x", "offsets", "threshold", "scale"], ["o"], hook=hook)
        for batch in (1, 2, 9, 30):
            lengths = rng.integers(1, 7, batch)
            offsets = np.cumsum([0, *lengths]).astype(offsets_type)
            x, scale = rng.standard_normal((offsets[-1], WIDTH)), rng.standard_normal(CLASSES)
            leave = rng.permutation(np.arange(batch) % 3)  # somebody everywhere
            threshold = np.where(leave[:, None] > [0, 1], 99.0, -99.0)
            found = runner.run({"x": x, "offsets": offsets, "threshold": threshold, "scale": scale})["o"]
            wanted = [
                model.alone(x[span], limits, scale) for span, limits in zip(spans(offsets), threshold, strict=True)
            ]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_outputs_before_an_exit_are_of_all_that_came_there() -> None:
    """Hidden states of the first segment are an output too, and read on by those who stay."""
    segments = [
        Function("x", "h early stays", lambda x: (x + 1, -x, x[:, 0] > 0)),
        Function("h", "o", lambda h: (h * 2,)),
    ]
    hook = Compaction([Exit(0, "stays", {"o": "early"})], Layout(frozenset(["h"])))
    runner = SegmentedRunner(segments, ["x"], ["h", "o"], hook=hook)
    x = np.array([[1.0], [-2.0], [3.0], [-4.0]])
    found = runner.run({"x": x})
    assert found["h"].tolist() == (x + 1).tolist() and found["o"].tolist() == [[4], [2], [8], [4]]


@pytest.mark.parametrize(
    ("stays", "early", "says"),
    [
        ([0, 0], [[1.0]] * 3, "'stays' does not tell which of 3 samples"),
        ([0, 3], [[1.0]] * 3, "does not tell"),
        ([-1], [[1.0]] * 3, "does not tell"),
        ([True, False], [[1.0]] * 3, "does not tell"),
        ([0.5, 1.0], [[1.0]] * 3, "does not tell"),
        ([1], [[1.0, 2.0]] * 3, "exits disagree on the output 'o'"),
        ([1], np.ones((3, 1), np.float32), "exits disagree"),
    ],
)
def test_exits_that_contradict_themselves(stays: Any, early: Any, says: str) -> None:
    segments = [
        Function("x", "h early stays", lambda x: (x, np.array(early), np.array(stays))),
        Function("h", "o", lambda h: (h,)),
    ]
    hook = Compaction([Exit(0, "stays", {"o": "early"})], Layout(frozenset(["h"])))
    with pytest.raises(TargetError, match=says):
        SegmentedRunner(segments, ["x"], ["o"], hook=hook).run({"x": np.ones((3, 1))})


@pytest.mark.parametrize(
    ("exits", "says"),
    [
        ([Exit(0, "stays", {"o": "early"})], r"how \['h'\] hold their samples"),
        ([Exit(1, "stays", {"o": "early"})], "behind segment 1 of 2"),
        ([Exit(-1, "stays", {"o": "early"})], "behind segment -1 of 2"),
        ([Exit(0, "stays", {})], r"gives \[\], and later segments compute \['o'\]"),
        ([Exit(0, "stays", {"o": "early", "p": "early"})], "gives"),
        ([Exit(0, "nothing", {"o": "early"})], "reads 'nothing'"),
    ],
)
def test_exits_that_do_not_fit_the_model(exits: list[Exit], says: str) -> None:
    segments = [Function("x", "h early stays", lambda x: (x,)), Function("h", "o", lambda h: (h,))]
    with pytest.raises((ValueError, TargetError), match=says):
        SegmentedRunner(segments, ["x"], ["o"], hook=Compaction(exits, Layout()))
