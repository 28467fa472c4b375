"""KeepTokens: kernel, reference body and ONNX's evaluator keep what its definition says, sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.compiler.targets.tensorrt.target import TensorRTRTX
from trimtab.plugins import KEEP_TOKENS, add_multi_output_node


def model(mode: str, first: int = 1) -> onnx.ModelProto:
    graph = graph_of(
        importance=(np.float32, ["rows"]), offsets=(np.int32, ["starts"]), threshold=(np.float32, ["settings"])
    )
    given = dict(zip(("importance", "offsets", "threshold"), graph.inputs, strict=True))
    kept, offsets = add_multi_output_node(graph, KEEP_TOKENS, given, "keep", mode=mode, first=first)
    assert kept.shape == ["keep.kept"] and offsets.shape == ["starts"]
    return finish(graph, kept, offsets)


def wanted(
    importance: np.ndarray, offsets: np.ndarray, settings: np.ndarray, mode: str, first: int
) -> tuple[list[int], list[int]]:
    """By sorting the rows of each sample: protected before NaN and infinity, then by importance, then by number."""
    kept, starts = [], [0]
    settings = np.broadcast_to(settings, len(offsets) - 1)
    for begin, end, setting in zip(offsets[:-1], offsets[1:], settings, strict=True):
        rows, n = range(begin, end), end - begin
        level = {i: np.inf if np.isnan(importance[i]) or (first and i == begin) else importance[i] for i in rows}
        order = sorted(rows, key=lambda i: (-level[i], i))
        if mode == "ratio":
            share = (
                n
                if np.isnan(setting)
                else int(np.ceil(min(max(setting, np.float32(0)), np.float32(1)) * np.float32(n)))
            )
            stay = set(order[: max(min(2, n), share)])
        else:
            stay = set(order[:2]) | {i for i in rows if not setting > 0 or level[i] >= setting}
        kept += sorted(stay)
        starts.append(len(kept))
    return kept, starts


def check(importance: object, offsets: object, settings: object, mode: str, first: int = 1) -> list[int]:
    feeds = {
        "importance": np.array(importance, np.float32),
        "offsets": np.array(offsets, np.int32),
        "threshold": np.array(settings, np.float32).reshape(-1),
    }
    kept, starts = wanted(*feeds.values(), mode, first)
    for where, got in everywhere(model(mode, first), feeds).items():
        for array, numbers in zip(got, (kept, starts), strict=True):
            assert array.dtype == np.int32
            np.testing.assert_array_equal(array, np.array(numbers, np.int32), where)
    return kept


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("mode", ["threshold", "ratio"])
def test_random_batches(mode: str, first: int) -> None:
    """Ties, NaN and infinities, empty samples and settings of each sample, in batches of 0 to 6."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for batch in (0, 1, 2, *rng.integers(1, 7, 5)):
        offsets = np.cumsum([0, *rng.choice([0, 1, 2, 3, 9, 40], batch)])
        levels = rng.random(int(rng.integers(1, 12))) if rng.integers(2) else rng.random(300)
        importance = rng.choice(levels, offsets[-1]).astype(np.float32)
        odd = rng.random(offsets[-1]) < 0.1
        importance[odd] = rng.choice([np.nan, np.inf, -np.inf, 0, -1], odd.sum())
        settings = rng.choice([*levels[:4], -1, 0, 0.3, 0.5, 1, 2, np.nan], int(rng.choice([1, batch])))
        check(importance, offsets, settings, mode, first)


@pytest.mark.parametrize("mode", ["threshold", "ratio"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_rows_at_all(lengths: list[int], mode: str) -> None:
    assert check([], np.cumsum([0, *lengths]), 0.5, mode) == []


def test_all_below_the_threshold() -> None:
    """The first of each sample and the best other one stay; of equal ones the first."""
    assert check([0.1, 0.3, 0.2, 0.3, 0.9, 0.0, 0.5], [0, 4, 4, 5, 7], 1.0, "threshold") == [0, 1, 4, 5, 6]
    assert check([0.1, 0.3, 0.2, 0.3, 0.9, 0.0, 0.5], [0, 4, 4, 5, 7], 1.0, "threshold", first=0) == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(("mode", "setting"), [("threshold", 0.0), ("threshold", -3.0), ("ratio", 1.0), ("ratio", 7.0)])
def test_the_exact_end_keeps_all(mode: str, setting: float) -> None:
    importance = seeded().standard_normal(40) - 1
    assert check(importance, [0, 3, 3, 4, 40], setting, mode) == list(range(40))


def test_shares_round_up() -> None:
    assert check(np.arange(10.0), [0, 10], 0.31, "ratio") == [0, 7, 8, 9]
    assert check(np.arange(10.0), [0, 10], 0.01, "ratio") == [0, 9]


def test_nan_stays() -> None:
    assert check([0, np.nan, 0.1, np.nan, 0.2, 9], [0, 6], 0.5, "threshold") == [0, 1, 3, 5]
    assert check([0, 0.1, np.nan, 9, 0.2], [0, 5], 0.5, "ratio") == [0, 2, 3]


def test_one_setting_as_a_scalar() -> None:
    graph = graph_of(importance=(np.float32, ["rows"]), offsets=(np.int32, ["starts"]), threshold=(np.float32, []))
    given = dict(zip(("importance", "offsets", "threshold"), graph.inputs, strict=True))
    made = finish(graph, *add_multi_output_node(graph, KEEP_TOKENS, given, "keep"))
    feeds = {"importance": np.array([0, 0.9, 0.2, 0.6], np.float32), "offsets": np.array([0, 4], np.int32)}
    for kept, offsets in everywhere(made, feeds | {"threshold": np.array(0.5, np.float32)}).values():
        assert kept.tolist() == [0, 1, 3] and offsets.tolist() == [0, 3]


def test_tensorrts_parser_takes_the_bodies(tmp_path: Path) -> None:
    """As TensorRT-RTX has it, whose parser works without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    paths = []
    for mode in ("threshold", "ratio"):
        paths.append(tmp_path / f"{mode}.onnx")
        onnx.save(model(mode), paths[-1])
    assert TensorRTRTX().parse(paths) == [[], []]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offsets": [0, 3, 2, 5]}, "do not ascend from 0 to the number of rows"),
        ({"offsets": [0, 3, 4, 6]}, "do not ascend"),
        ({"offsets": [1, 3, 4, 5]}, "do not ascend"),
        ({"offsets": []}, r"not \[batch \+ 1\]"),
        ({"threshold": [0, 1]}, "one for each sample"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, list[int]], says: str) -> None:
    feeds = {"importance": np.zeros(5, np.float32), "offsets": [0, 3, 4, 5], "threshold": np.zeros(3, np.float32)}
    given = {
        name: np.array(value, np.int32 if name == "offsets" else np.float32) for name, value in (feeds | change).items()
    }
    with pytest.raises(Exception, match=says):
        native(model("threshold")).run(None, given)
