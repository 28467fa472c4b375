"""The models for Triton's Python backend, without a server: what each request gets, whatever else is asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from seeds import seeded

from trimtab.passes.dials import Dials
from trimtab.passes.errors import InputError, TargetError


class Refusal(str):
    """In place of the server's TritonError."""

    INVALID_ARG, INTERNAL = 3, 1
    code: int

    def __new__(cls, text: str, code: int) -> Refusal:
        made = super().__new__(cls, text)
        made.code = code
        return made


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of the module that the server gives: a request is {name: array}."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: (
        SimpleNamespace(as_numpy=lambda: request.given[name]) if name in request.given else None
    )
    module.TritonError, module.InferenceResponse = Refusal, lambda error: error
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for name in [name for name in sys.modules if name.startswith("trimtab.compiler.packaging.triton.served.")]:
        del sys.modules[name]


def asked(name: str, text: str, **settings: int) -> Any:
    given = {name: np.array([[text.encode()]], object)} | {n: np.array([[v]]) for n, v in settings.items()}
    return SimpleNamespace(given=given, get_response_sender=lambda: None)


def test_a_long_prompt_does_not_cut_the_answers_of_others(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.generate import _parse

    tokenizer = SimpleNamespace(prompts=lambda texts: [[5] * len(text.split()) for text in texts])
    engine = SimpleNamespace(tokenizer=tokenizer, manifest=SimpleNamespace(max_tokens=64, all_dials=Dials()))
    long, short, other = (_parse(asked("text_input", " ".join(["w5"] * n), max_tokens=30), engine) for n in (60, 2, 34))
    assert (long.max_tokens, short.max_tokens, other.max_tokens) == (4, 30, 30)
    assert long.key != short.key == other.key


def test_a_text_of_which_nothing_is_left_is_refused_alone(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.front import TritonPythonModel

    def encode(texts: list[str], limit: int | None = None) -> dict[str, np.ndarray]:
        lengths = np.array([len(text.replace("?", "")) for text in texts])
        return {"attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)}

    model: Any = TritonPythonModel()
    model._settings = {"special_tokens": 0, "tokens": [1, 8]}
    model._tokenizer, model._dials = SimpleNamespace(encode=encode), Dials()
    assert model._texts(asked("TEXT", "a?")) == ["a?"]
    with pytest.raises(InputError, match="makes no tokens"):
        model._texts(asked("TEXT", "??"))
    model._answer = lambda batch, dials: np.arange(len(batch))
    model._respond = lambda rows: rows
    first, refused, last = model.execute([asked("TEXT", text) for text in ("a", "?", "b")])
    assert (first.tolist(), last.tolist()) == ([0], [1]) and "makes no tokens" in refused
    assert refused.code == Refusal.INVALID_ARG


def test_pairs_of_unequal_rows_are_refused_alone(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.front import TritonPythonModel

    def pairs(first: int, second: int) -> Any:
        rows = {"TEXT": first, "TEXT_PAIR": second}
        return SimpleNamespace(given={n: np.array([[b"w"]] * count, object) for n, count in rows.items()})

    model: Any = TritonPythonModel()
    model._settings, model._dials = {"special_tokens": 2}, Dials()
    model._answer = lambda batch, dials: np.arange(len(batch))
    model._respond = lambda rows: rows
    first, refused, more, last = model.execute([pairs(2, 2), pairs(1, 2), pairs(3, 1), pairs(1, 1)])
    assert (first.tolist(), last.tolist()) == ([0, 1], [2])
    assert "TEXT has 1 rows and TEXT_PAIR 2" in refused and "TEXT has 3 rows and TEXT_PAIR 1" in more
    assert model._texts(pairs(1, 1)) == [("w", "w")]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("TEXT is odd", hint="send\nanother"), Refusal.INVALID_ARG, "TEXT is odd; send another"),
        (TargetError("the engine is gone"), Refusal.INTERNAL, "the engine is gone"),
        (RuntimeError("Got invalid dimensions for input: x for the following indices index: 1 Got: 5 Expected: 4"),
         Refusal.INVALID_ARG, "input 'x' has the size 5 along axis 1"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 64"), Refusal.INTERNAL, "memory ran out"),
        (KeyError("x"), Refusal.INTERNAL, "KeyError"),
    ],
)  # fmt: skip
def test_only_a_request_at_fault_is_answered_as_one(backend: Any, error: Exception, code: int, says: str) -> None:
    from trimtab.compiler.packaging.triton.served.common import refusal

    refused = refusal(error)
    assert refused.code == code and says in refused and "\n" not in refused


def engine_model(limits: dict[str, Any], run: Any) -> Any:
    from trimtab.compiler.packaging.triton.served.common import read_limits
    from trimtab.compiler.packaging.triton.served.engine import TritonPythonModel

    model: Any = TritonPythonModel()
    model._batched, model._dials, model._inputs = True, Dials(), [tensor["name"] for tensor in limits["inputs"]]
    model._limits, model._session = read_limits(limits), SimpleNamespace(run=run)
    return model


def tensors(**given: np.ndarray) -> Any:
    return SimpleNamespace(given=given, requested_output_names=lambda: ["y"])


def test_tensors_that_the_engine_does_not_take_are_refused_alone(backend: Any) -> None:
    backend.InferenceResponse = lambda tensors=None, error=None: error or tensors[0]
    backend.Tensor = lambda name, value: value
    rows = int(seeded().integers(5, 90))
    shape = ["batch", "tokens"]
    ids = {"name": "input_ids", "dtype": "int64", "shape": shape, "bounds": [0, rows - 1]}
    mask = {"name": "attention_mask", "dtype": "int64", "shape": shape, "bounds": None}
    limits = {"inputs": [ids, mask], "packed": [], "positions": {"most": 6, "padding": True}}
    model = engine_model(limits, lambda names, feeds: [feeds["input_ids"] * 2])
    one = np.ones((1, 4), np.int64)
    good = tensors(input_ids=one, attention_mask=one)
    wrong = [
        (tensors(input_ids=one * rows, attention_mask=one), f"holds {rows} at"),
        (tensors(input_ids=-one, attention_mask=one), "holds -1 at"),
        (tensors(input_ids=one, attention_mask=one * 3), "'attention_mask' holds 3"),
        (tensors(input_ids=one, attention_mask=np.ones((1, 3), np.int64)), "disagree on tokens"),
        (tensors(input_ids=np.ones((1, 7), np.int64), attention_mask=np.ones((1, 7), np.int64)), "7 tokens"),
    ]
    answers = model.execute([request for bad, _ in wrong for request in (good, bad)])
    for answer in answers[::2]:
        np.testing.assert_array_equal(answer, one * 2)
    for refused, (_, says) in zip(answers[1::2], wrong, strict=True):
        assert says in refused and refused.code == Refusal.INVALID_ARG


def test_what_fails_together_is_run_alone(backend: Any) -> None:
    backend.InferenceResponse = lambda tensors=None, error=None: error or tensors[0]
    backend.Tensor = lambda name, value: value
    x = {"name": "x", "dtype": "float32", "shape": ["batch", 2], "bounds": None}

    def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if (feeds["x"] > 5).any():
            raise RuntimeError("indices element out of data bounds, idx=9 must be within the inclusive range [-4,3]")
        return [feeds["x"] + 1]

    model = engine_model({"inputs": [x], "packed": [], "positions": None}, run)
    first, refused, last = model.execute([tensors(x=np.full((1, 2), v, np.float32)) for v in (1, 9, 2)])
    assert (first.tolist(), last.tolist()) == ([[2, 2]], [[3, 3]])
    assert refused.code == Refusal.INVALID_ARG and "the index 9 lies outside of 0 to 3" in refused


def test_each_instance_has_its_gpu(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from trimtab.compiler.packaging.triton.served import session

    monkeypatch.setattr(session.ort, "InferenceSession", lambda path, options, providers: providers)
    told = {"threads": 1, "entries": {}, "library": None}
    told["providers"] = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    found = session.open_session(tmp_path, told, "1")
    assert found == [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]
