"""GatherBlocks: of the numbers of all neurons those of the chosen blocks, in every runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from dialects import everywhere, finish, graph_of, native
from seeds import seeded

from trimtab.passes.graph import save_graph
from trimtab.passes.lower import lower
from trimtab.plugins import GATHER_BLOCKS, add_node


def model(neurons: int, block: int, at_most: int, lead: list[int | str]) -> gs.Graph:
    graph = graph_of(x=(np.float32, [*lead, neurons]), blocks=(np.int32, ["selections", "k"]))
    x, blocks = graph.inputs
    graph.outputs = [add_node(graph, GATHER_BLOCKS, {"x": x, "blocks": blocks}, "y", block=block, at_most=at_most)]
    return graph


def choices(selections: int, count: int, k: int, at_most: bool, rng: np.random.Generator) -> np.ndarray:
    """Ascending blocks, and with `at_most` -1 behind some of them, [selections, k]."""
    made = np.full((selections, k), -1, np.int32)
    for row in made:
        own = int(rng.integers(0, k + 1)) if at_most else k
        row[:own] = np.sort(rng.choice(count, own, replace=False))
    return made


def expected(x: np.ndarray, blocks: np.ndarray, block: int) -> np.ndarray:
    flat = x.reshape(-1, x.shape[-1])
    rows = (blocks[:, :, None] * block + np.arange(block)).reshape(len(blocks), blocks.shape[1] * block)
    rows = np.broadcast_to(rows, (len(flat), rows.shape[1]))
    found = np.where(rows >= 0, np.take_along_axis(flat, np.maximum(rows, 0), 1), 0)
    return found.reshape(*x.shape[:-1], rows.shape[1])


@pytest.mark.parametrize("at_most", [0, 1])
def test_takes_the_chosen_blocks(at_most: int) -> None:
    rng = seeded()
    for lead in ([7], [2, 3], [1], [0], [3, 0]):
        block, count = int(rng.integers(1, 6)), int(rng.integers(1, 9))
        graph = model(block * count, block, at_most, [f"d{i}" for i in range(len(lead))])
        made = finish(graph, *graph.outputs)
        x = rng.standard_normal((*lead, block * count)).astype(np.float32)
        for selections in {1, int(np.prod(lead))}:
            blocks = choices(selections, count, int(rng.integers(1, count + 1)), bool(at_most), rng)
            wanted = expected(x, blocks, block)
            for name, (found,) in everywhere(made, {"x": x, "blocks": blocks}).items():
                np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_in_standard_ops(tmp_path: Path) -> None:
    rng = seeded()
    graph = model(24, 4, 1, ["batch", "tokens"])
    lower(graph)
    assert {node.domain or "" for node in graph.nodes} == {""}
    save_graph(graph, tmp_path / "lowered.onnx")
    engine = ort.InferenceSession(str(tmp_path / "lowered.onnx"), providers=["CPUExecutionProvider"])
    x = rng.standard_normal((2, 3, 24)).astype(np.float32)
    for selections in (1, 6):
        blocks = choices(selections, 6, 4, True, rng)
        (found,) = engine.run(None, {"x": x, "blocks": blocks})
        np.testing.assert_array_equal(found, expected(x, blocks, 4))


@pytest.mark.parametrize(
    ("x", "blocks", "says"),
    [((2, 8), [[0, 2]], "outside the weights"), ((2, 7), [[0]], "does not divide"), ((3, 8), [[0], [1]], "tokens")],
)
def test_refuses(x: tuple[int, ...], blocks: list[list[int]], says: str) -> None:
    graph = model(x[-1], 4, 0, ["tokens"])
    engine = native(finish(graph, *graph.outputs))
    with pytest.raises(Exception, match=says):
        engine.run(None, {"x": np.zeros(x, np.float32), "blocks": np.array(blocks, np.int32)})
