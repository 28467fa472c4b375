"""cut: segments run one after the other compute the whole, and each point ends one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from onnx import parser
from rewrite import canonical, session
from seeds import seeded

from trimtab.passes.graph import constant, insert, load_graph, save_graph
from trimtab.passes.graph.cut import Segment, cut

TEXT = """
<ir_version: 9, opset_import: ["" : 18]>
plain (float[n, 4] x, float[n, 4] other) => (float[n, 4] y, float[n, 4] side)
<float[4, 4] w = {1,2,3,4, 5,6,7,8, 9,1,2,3, 4,5,6,7}>
{
  t = Transpose <perm = [1, 0]> (w)
  a = MatMul (x, t)
  b = Relu (a)
  late = Neg (x)
  c = Add (b, late)
  d = MatMul (c, t)
  side = Sub (d, other)
  e = Sigmoid (d)
  y = Add (e, b)
}
"""


def plain(folder: Path) -> gs.Graph:
    onnx.save(parser.parse_model(TEXT), folder / "plain.onnx")
    return load_graph(folder / "plain.onnx")


def run(segments: list[Segment], feeds: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """All tensors that ever crossed a cut, or left the graph."""
    held = dict(feeds)
    for segment in segments:
        save_graph(segment.graph, folder / "segment.onnx")
        part = session(folder / "segment.onnx")
        found = part.run(None, {tensor.name: held[tensor.name] for tensor in part.get_inputs()})
        held |= dict(zip([tensor.name for tensor in part.get_outputs()], found, strict=True))
    return held


def names(tensors: list[gs.Tensor]) -> set[str]:
    return {tensor.name for tensor in tensors}


@pytest.mark.parametrize(
    "points", [[], ["b"], ["a", "d"], ["b", "late"], ["e"], ["y"], ["a", "b", "c", "d", "e"]], ids=str
)
def test_segments_compute_the_whole(points: list[str], tmp_path: Path) -> None:
    graph = plain(tmp_path)
    rng = seeded()
    feeds = {name: rng.standard_normal((3, 4)).astype(np.float32) for name in ("x", "other")}
    whole = session(tmp_path / "plain.onnx").run(None, feeds)
    segments = cut(graph, [graph.tensors()[name] for name in points])
    found = run(segments, feeds, tmp_path)
    for name, wanted in zip(("y", "side"), whole, strict=True):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6)
    assert sorted(name for segment in segments for name in segment.points) == sorted(points)


def test_what_reads_a_point_runs_later_and_all_else_early(tmp_path: Path) -> None:
    graph = plain(tmp_path)
    first, second, third = cut(graph, [graph.tensors()[name] for name in ("b", "d")])
    assert (first.points, second.points, third.points) == (("b",), ("d",), ())
    assert {node.op for node in first.graph.nodes} == {"Transpose", "MatMul", "Relu", "Neg"}
    assert {node.op for node in second.graph.nodes} == {"Add", "MatMul", "Transpose"}  # a weight's own nodes come along
    assert names(first.graph.inputs) == {"x"} and names(first.graph.outputs) == {"b", "late"}
    assert names(second.graph.inputs) == {"b", "late"} and names(second.graph.outputs) == {"d"}
    assert names(third.graph.inputs) == {"b", "d", "other"} and names(third.graph.outputs) == {"y", "side"}
    assert [t.name for t in graph.outputs] == ["y", "side"] and len(graph.nodes) == 9  # as it was


def test_independent_points_end_the_same_segment(tmp_path: Path) -> None:
    graph = plain(tmp_path)
    segments = cut(graph, [graph.tensors()[name] for name in ("late", "a")])
    assert [segment.points for segment in segments] == [("late", "a"), ()]


def test_a_point_that_is_an_output_needs_no_segment_behind(tmp_path: Path) -> None:
    graph = plain(tmp_path)
    (only,) = cut(graph, [graph.tensors()["y"]])
    assert only.points == ("y",)


def test_the_whole_reads_a_point_as_it_is_made_between(tmp_path: Path) -> None:
    """What is done to a point between two segments reaches all that reads it, however late."""
    graph = plain(tmp_path)
    feeds = {name: np.ones((2, 4), np.float32) for name in ("x", "other")}
    segments = cut(graph, [graph.tensors()["b"]])
    before = run(segments[:1], feeds, tmp_path)
    doubled = run(segments[1:], before | {"b": 2 * before["b"]}, tmp_path)
    scale = constant("two", np.float32(2))
    again = plain(tmp_path)
    b = again.tensors()["b"]
    readers = list(b.outputs)
    twice = insert(again, "Mul", [b, scale], "twice", dtype=np.float32)
    for node in readers:
        node.inputs = [twice if tensor is b else tensor for tensor in node.inputs]
    save_graph(again, tmp_path / "again.onnx")
    np.testing.assert_allclose(doubled["y"], session(tmp_path / "again.onnx").run(["y"], feeds)[0], rtol=1e-6)


def test_a_subgraph_reads_across_a_cut(tmp_path: Path) -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 18]>
    branches (float[n] x, bool which) => (float[n] y)
    {
      a = Exp (x)
      b = Neg (a)
      y = If (which) <
        then_branch = g1 () => (float[n] p) { p = Add (a, b) },
        else_branch = g2 () => (float[n] q) { q = Identity (a) }
      >
    }
    """
    onnx.save(parser.parse_model(text), tmp_path / "if.onnx")
    graph = load_graph(tmp_path / "if.onnx")
    segments = cut(graph, [graph.tensors()["b"]])
    assert names(segments[1].graph.inputs) == {"a", "b", "which"}
    for which in (True, False):
        feeds = {"x": np.array([0.5, -1], np.float32), "which": np.array(which)}
        wanted = session(tmp_path / "if.onnx").run(None, feeds)[0]
        np.testing.assert_allclose(run(segments, feeds, tmp_path)["y"], wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["x", "t"])
def test_refuses_points_that_nothing_computes(name: str, tmp_path: Path) -> None:
    graph = plain(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' is not computed from the inputs of the graph"):
        cut(graph, [graph.tensors()[name]])


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_transformers_at_every_residual(family: str, tmp_path: Path) -> None:
    path = zoo.exported(family)
    graph = canonical(path)
    points = [node.outputs[0] for node in graph.nodes if node.op == "MatMul" and node.inputs[1].inputs == []]
    segments = cut(graph, points[1::2])
    assert len(segments) > 3
    feeds = zoo.feeds(family, 2, 6, seeded())
    whole = session(path)
    wanted = whole.run(None, {tensor.name: feeds[tensor.name] for tensor in whole.get_inputs()})
    found = run(segments, feeds, tmp_path)
    for tensor, value in zip(whole.get_outputs(), wanted, strict=True):
        np.testing.assert_allclose(found[tensor.name], value, rtol=1e-4, atol=1e-5)
