"""Native code that does not come back: a limit of time, and signals that are answered meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from threading import Event, Timer

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trimtab.compiler import compile_model
from trimtab.compiler.checks import selfcheck
from trimtab.compiler.checks.patience import within
from trimtab.passes.errors import TargetError


def endless(path: Path, width: int) -> Path:
    """x → x, doubled again and again in a Loop whose condition stays true."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["v", "v"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    shape = ["batch", width]
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.array(True), "true")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_what_a_call_gives_or_raises() -> None:
    assert within(60, lambda: 3, lambda: None) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0, lambda: None)


def test_a_call_is_stopped_when_the_time_is_over() -> None:
    stopped = Event()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: stopped.wait(60), stopped.set)
    assert stopped.is_set()


def test_a_signal_is_answered_at_once_and_stops_the_call() -> None:
    stopped = Event()
    Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        within(60, lambda: stopped.wait(60), stopped.set)
    assert stopped.is_set() and time.monotonic() - start < 30


def test_a_graph_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "MAX_SECONDS", 0.5)
    with pytest.raises(TargetError, match=r"the dense model ran longer than 0\.5 s") as caught:
        compile_model(endless(tmp_path / "endless.onnx", 4), {"passes": []}, tmp_path / "build")
    assert "check: false" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".onnx") == []
