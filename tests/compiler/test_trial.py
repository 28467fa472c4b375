"""A foreign ONNX file is read in a child process first: once, within limits, and ONNX Runtime's reasons are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from seeds import seeded

from trimtab.compiler.sources import open_source, trial
from trimtab.passes.errors import ModelError, PassError

pytestmark = pytest.mark.usefixtures("try_in_child")


def model(rows: int = 8) -> ModelProto:
    """x [n, rows] → MatMul → Relu → y [n, 16]."""
    weight = seeded().normal(size=(rows, 16)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"], name="product"), helper.make_node("Relu", ["h"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_file_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, try_in_child: Callable[[Path, Path], str]
) -> None:
    asked = []
    monkeypatch.setattr(trial, "in_child", lambda *given: asked.append(given) or try_in_child(*given))
    monkeypatch.setattr("trimtab.compiler.caching.remembered.is_settled", lambda stamp: True)
    onnx.save(model(), tmp_path / "m.onnx")
    for _ in range(2):
        assert open_source(tmp_path / "m.onnx").onnx == tmp_path / "m.onnx"
    assert len(asked) == 1
    onnx.save(model(rows=9), tmp_path / "m.onnx")
    open_source(tmp_path / "m.onnx")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim[1].__setattr__("dim_value", 3), "product.*Incomp"),
        (lambda m: m.graph.input[0].type.tensor_type.__setattr__("elem_type", TensorProto.INT64), "mixes tensor"),
        (lambda m: m.graph.node[1].attribute.add(name="a", type=2, i=1), "Relu: Unrecognized attribute: a"),
    ],
)  # fmt: skip
def test_what_no_runtime_could_run_is_refused(tmp_path: Path, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    given = model()
    change(given)
    (tmp_path / "m.onnx").write_bytes(given.SerializeToString())
    with pytest.raises(ModelError, match=f"m.onnx: ONNX Runtime refuses the model as invalid: .*{reason}") as caught:
        open_source(tmp_path / "m.onnx")
    assert "ONNXRuntimeError" not in str(caught.value)


@pytest.mark.parametrize("domain", ["trt.plugins", ""])
def test_what_onnx_runtime_lacks_is_no_fault(tmp_path: Path, domain: str) -> None:
    """An op of TensorRT's plugins: another target may have it."""
    given = model()
    given.opset_import.append(helper.make_opsetid("trt.plugins", 1))
    given.graph.node[1].domain, given.graph.node[1].op_type = domain, "Own"
    onnx.save(given, tmp_path / "m.onnx")
    trial.try_out(tmp_path / "m.onnx", tmp_path)


def test_weights_are_not_part_of_what_is_checked(tmp_path: Path) -> None:
    large = model(rows=4096)
    assert len(trial.without_weights(large).SerializeToString()) < 1000  # type: ignore[union-attr]
    onnx.save(model(rows=4096), tmp_path / "m.onnx", save_as_external_data=True, location="w.data", size_threshold=0)
    trial.try_out(tmp_path / "m.onnx", tmp_path)
    with pytest.raises(ModelError, match="mixes tensor"):
        given = model(rows=4096)
        given.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((4096, 16)), "w"))
        (tmp_path / "n.onnx").write_bytes(given.SerializeToString())
        trial.try_out(tmp_path / "n.onnx", tmp_path)


def test_a_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    monkeypatch.setattr(trial, "MAX_SECONDS", 0.01)
    with pytest.raises(ModelError, match=r"m.onnx: reading its graph took longer than 0.01 s"):
        open_source(tmp_path / "m.onnx")


def test_a_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(model(rows=1 << 21), tmp_path / "m.onnx")  # 128 MB, which reading holds twice at least
    monkeypatch.setattr(trial, "_MEMORY", 256 << 20)
    monkeypatch.setattr(trial, "_PER_BYTE", 0)
    with pytest.raises(ModelError, match=r"m.onnx: .*more than 256 MB of memory") as caught:
        open_source(tmp_path / "m.onnx")
    assert "Traceback" not in str(caught.value)
    print(caught.value)


def test_a_fault_of_a_pass_asks_for_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the file: it is well-formed, and ONNX Runtime takes it."""
    onnx.save(model(), tmp_path / "m.onnx")
    source = open_source(tmp_path / "m.onnx")
    source.graph()
    monkeypatch.setattr("trimtab.passes.canonicalize.lift_gemms", lambda graph: {}["a key"])
    with pytest.raises(PassError, match=r"pass canonicalize: KeyError: 'a key'; .*please report"):
        source.graph()
