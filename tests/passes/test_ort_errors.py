"""What ONNX Runtime refuses or fails at, in words of trimtab, whatever the sizes and names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, open_session
from trimtab.passes.errors import TargetError
from trimtab.passes.ort_errors import exceptions, explain, running

RAW = re.compile(
    r"ONNXRuntimeError|INVALID_|_ARGUMENT|NOT_IMPLEMENTED|FAIL\b|\.(cc|h):\d|status code|onnxruntime::|Status Message"
)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any] | None]],
    *,
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    ir: int = 9,
    domain: str | None = None,
) -> onnx.ModelProto:
    made = helper.make_graph(
        list(nodes), "g", [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("y", next(iter(inputs.values()))[0], None)],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=domains, ir_version=ir)


def floats(*shape: Any) -> tuple[int, list[Any]]:
    return TensorProto.FLOAT, list(shape)


def unary(op: str, name: str, kind: tuple[int, list[Any]], **more: Any) -> onnx.ModelProto:
    domain = more.pop("op_domain", None)
    return graph([helper.make_node(op, ["x"], ["y"], name=name, domain=domain)], {"x": kind}, **more)


def width() -> int:
    return int(seeded().integers(3, 40))


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "an unknown op": (lambda: unary("Nonsense", "n1", floats("b")), "no op Nonsense of opset 18"),
    "an op of elsewhere": (
        lambda: unary("Odd", "n1", floats("b"), op_domain="nowhere", domain="nowhere"), "no op nowhere:Odd"
    ),
    "an op of no domain": (lambda: unary("Odd", "n1", floats("b"), op_domain="other"), "no opset .* domain 'other'"),
    "an opset to come": (lambda: unary("Relu", "n1", floats("b"), opset=99), "does not support opset 99"),
    "a format to come": (lambda: unary("Relu", "n1", floats("b"), ir=99), "IR version 99"),
    "no kernel": (
        lambda: graph(
            [helper.make_node("Add", ["x", "x"], ["y"], name="a/plus")], {"x": (TensorProto.BFLOAT16, ["b"])}
        ),
        r"no kernel for node 'a/plus' \(Add\)",
    ),
    "a type": (
        lambda: unary("Erf", "deep/erf", (TensorProto.INT32, ["b"])),
        r"node 'deep/erf' \(Erf\) does not take tensor\(int32\)",
    ),
    "a type that it lacks": (lambda: unary("Identity", "n", (TensorProto.COMPLEX64, ["b"])), "no tensor.complex64"),
    "two types": (
        lambda: graph(
            [helper.make_node("Add", ["x", "k"], ["y"], name="plus")],
            {"x": floats("b"), "k": (TensorProto.INT64, ["b"])},
        ),
        r"node 'plus' \(Add\) mixes tensor\(float\) and tensor\(int64\)",
    ),
    "sizes": (
        lambda: graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer/up")], {"x": floats("b", width())},
            weights={"w": np.zeros((50, width()), np.float32)},
        ),
        r"node 'layer/up' \(MatMul\): Incompatible dimensions",
    ),
    "a cycle": (
        lambda: graph(
            [helper.make_node("Add", ["x", "z"], ["y"]), helper.make_node("Relu", ["y"], ["z"])], {"x": floats("b")}
        ),
        "the graph is not acyclic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_graph_that_is_refused(what: str) -> None:
    make, says = REFUSED[what]
    with pytest.raises(TargetError, match=f"ONNX Runtime does not take this graph: .*{says}") as caught:
        open_session(make().SerializeToString())
    assert not RAW.search(str(caught.value)), caught.value


def test_files_that_are_no_models(tmp_path: Path) -> None:
    size = width()
    model = graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": floats("b", 400)},
        weights={"w": np.ones((400, size), np.float32)},
    )  # fmt: skip
    path, data = tmp_path / "model.onnx", tmp_path / "model.data"
    onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=10)
    open_session(path)
    data.write_bytes(data.read_bytes()[: 100 * size])
    cases = [
        ("the data of weight 'w' are cut off", data.unlink),
        ("model.data is missing", lambda: path.write_bytes(b"x")),
    ]
    cases += [("no ONNX file, or cut off", lambda: path.write_bytes(b"")), ("no ONNX file, or cut off", path.unlink)]
    for says, then in [*cases, ("there is no such file", lambda: None)]:
        with pytest.raises(TargetError, match=says) as caught:
            open_session(path)
        assert caught.value.hint and not RAW.search(str(caught.value)), caught.value
        then()


def words() -> OnnxRuntimeRunner:
    table = np.zeros((width(), 4), np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="words"),
        helper.make_node("Add", ["rows", "more"], ["y"], name="plus"),
    ]
    inputs: dict[str, tuple[int, list[Any] | None]] = {"ids": (TensorProto.INT64, ["b"]), "more": floats("m", 4)}
    model = graph(nodes, inputs, weights={"table": table})
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return OnnxRuntimeRunner(model.SerializeToString())


@pytest.mark.parametrize(
    ("ids", "more", "says"),
    [
        (
            np.array([10**6]),
            np.zeros((1, 4), np.float32),
            r"the index 1000000 lies outside of 0 to \d+, at node 'words'",
        ),
        (np.zeros(2, np.int64), np.zeros((3, 4), np.float32), r"sizes .* do not go together, at node 'plus' \(Add\)"),
        (np.zeros(2, np.int64), np.zeros((2, 5), np.float32), "'more' has the size 5 along axis 1, .* takes 4"),
        (np.zeros((2, 2), np.int64), np.zeros((2, 4), np.float32), "'ids' has 2 dimensions, and the model takes 1"),
        (np.zeros(2, np.int64), np.zeros((2, 4)), "an input is double, and the model takes float"),
    ],
)
def test_inputs_that_do_not_fit(ids: np.ndarray, more: np.ndarray, says: str) -> None:
    runner = words()
    assert runner.run({"ids": np.zeros(2, np.int64), "more": np.ones((1, 4), np.float32)})["y"].sum() == 8
    with pytest.raises(TargetError, match=f"could not run the model: .*{says}") as caught:
        runner.run({"ids": ids, "more": more})
    cause = caught.value.__cause__
    assert isinstance(cause, Exception) and explain(cause).by_inputs
    assert caught.value.hint and not RAW.search(str(caught.value)), caught.value


@pytest.mark.parametrize(
    "text",
    [
        "Status Message: /a/b/bfc_arena.cc:360 void* Arena::Allocate(size_t) Failed to allocate memory for requested "
        "buffer of size 8796093022208",
        "Status Message: std::bad_alloc",
    ],
)
def test_memory_that_ran_out_is_no_fault_of_inputs(text: str) -> None:
    found = explain(RuntimeError(f"Non-zero status code returned while running Expand node. Name:'big' {text}"))
    assert found.words.startswith("memory ran out") and not found.by_inputs and "smaller batches" in str(found.hint)


def test_without_onnxruntime_there_is_nothing_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a server whose models ask an engine of another backend."""
    monkeypatch.setitem(sys.modules, "onnxruntime.capi", None)
    assert exceptions.__wrapped__() == (ValueError, RuntimeError)
    monkeypatch.undo()
    assert len(exceptions()) > 2


def test_a_text_that_no_pattern_knows_is_cut_and_without_codes() -> None:
    text = (
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Loop node. Name:'l' "
    )
    text += "Status Message: /src/core/loop.cc:77 onnxruntime::Loop::Run(int, bool) const x was false. "
    found = explain(RuntimeError(text + "Odd thing. " + "z" * 5000))
    assert found.words.startswith("node 'l' (Loop): Odd thing. zzz") and len(found.words) < 300
    assert explain(RuntimeError("")).words == "RuntimeError"
    with pytest.raises(KeyError), running("the model"):
        raise KeyError("no exception of ONNX Runtime")
