"""KeepSamples: kernel, reference body and ONNX's evaluator part a packed batch as its definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.compiler.targets.tensorrt.target import TensorRTRTX
from trimtab.plugins import KEEP_SAMPLES, add_multi_output_node

NAMES = ("uncertainty", "threshold", "offsets", "x")


def model() -> onnx.ModelProto:
    graph = graph_of(
        uncertainty=(np.float32, ["batch"]),
        threshold=(np.float32, ["settings"]),
        offsets=(np.int32, ["starts"]),
        x=(np.float32, ["rows", 3]),
    )
    given = dict(zip(NAMES, graph.inputs, strict=True))
    outputs = add_multi_output_node(graph, KEEP_SAMPLES, given, "exit")
    assert [tensor.shape for tensor in outputs] == [["exit.stay"], ["exit.rows"], ["exit.starts"]]
    return finish(graph, *outputs)


def check(uncertainty: Any, threshold: Any, lengths: Any) -> list[list[int]]:
    feeds = {
        "uncertainty": np.array(uncertainty, np.float32),
        "threshold": np.array(threshold, np.float32).reshape(-1),
        "offsets": np.cumsum([0, *lengths]).astype(np.int32),
        "x": np.zeros((sum(lengths), 3), np.float32),
    }
    settings = np.broadcast_to(feeds["threshold"], len(feeds["uncertainty"]))
    stay = [b for b, (u, limit) in enumerate(zip(feeds["uncertainty"], settings, strict=True)) if not u < limit]
    rows = [row for b in stay for row in range(feeds["offsets"][b], feeds["offsets"][b + 1])]
    starts = [0, *np.cumsum([feeds["offsets"][b + 1] - feeds["offsets"][b] for b in stay], dtype=int)]
    for where, got in everywhere(model(), feeds).items():
        for array, numbers in zip(got, (stay, rows, starts), strict=True):
            assert array.dtype == np.int32
            np.testing.assert_array_equal(array, np.array(numbers, np.int32), where)
    return [stay, rows, starts]


def test_random_batches() -> None:
    """Ties, NaN and infinities, empty samples and settings of each sample, in batches of 0 to 6."""
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for batch in (0, 1, 2, *rng.integers(1, 7, 6)):
        levels = [0, 0.25, 0.5, 1, *rng.random(3), np.nan, np.inf, -1]
        uncertainty = rng.choice(levels, batch)
        check(uncertainty, rng.choice(levels, int(rng.choice([1, batch]))), rng.choice([0, 1, 2, 9, 40], batch))


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan])
def test_the_exact_end_keeps_all(threshold: float) -> None:
    uncertainty = seeded().random(5)
    uncertainty[0] = 0
    stay, rows, _ = check(uncertainty, threshold, [3, 0, 1, 7, 2])
    assert (stay, rows) == (list(range(5)), list(range(13)))


def test_all_leave_at_once() -> None:
    assert check([0.1, 0.2], 0.3, [4, 5]) == [[], [], [0]]


def test_equal_to_the_threshold_stays_and_nan_too() -> None:
    assert check([0.5, 0.4, np.nan, 0.5], [0.5, 0.5, 0.5, 0.6], [1, 2, 3, 4])[0] == [0, 2]


def test_tensorrts_parser_takes_the_body(tmp_path: Path) -> None:
    """As TensorRT-RTX has it, whose parser works without a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    onnx.save(model(), tmp_path / "model.onnx")
    assert TensorRTRTX().parse([tmp_path / "model.onnx"]) == [[]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offsets": [0, 3, 2, 5]}, "do not ascend from 0"),
        ({"offsets": [1, 3, 4, 5]}, "do not ascend from 0"),
        ({"offsets": [0, 3, 4, 4]}, "to the number of rows"),
        ({"offsets": [0, 3]}, r"not \[batch \+ 1\]"),
        ({"threshold": [0, 1]}, "one for each sample"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, list[int]], says: str) -> None:
    feeds = {"uncertainty": [0, 0, 0], "threshold": [0], "offsets": [0, 3, 4, 5], "x": np.zeros((5, 3))} | change
    kinds = {"offsets": np.int32}
    with pytest.raises(Exception, match=says):
        native(model()).run(None, {name: np.array(feeds[name], kinds.get(name, np.float32)) for name in NAMES})
