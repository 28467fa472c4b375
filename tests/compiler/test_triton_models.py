"""The models for Triton's Python backend, without a server: what each request gets, whatever else is asked for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from trimtab.passes.dials import Dials
from trimtab.passes.errors import InputError


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """In place of the module that the server gives: a request is {name: array}."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.get_input_tensor_by_name = lambda request, name: (
        SimpleNamespace(as_numpy=lambda: request.given[name]) if name in request.given else None
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for name in [name for name in sys.modules if name.startswith("trimtab.compiler.packaging.triton.served.")]:
        del sys.modules[name]


def asked(name: str, text: str, **settings: int) -> Any:
    given = {name: np.array([[text.encode()]], object)} | {n: np.array([[v]]) for n, v in settings.items()}
    return SimpleNamespace(given=given, get_response_sender=lambda: None)


def test_a_long_prompt_does_not_cut_the_answers_of_others(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.generate import _wanted

    tokenizer = SimpleNamespace(prompts=lambda texts: [[5] * len(text.split()) for text in texts])
    engine = SimpleNamespace(tokenizer=tokenizer, manifest=SimpleNamespace(max_tokens=64, all_dials=Dials()))
    long, short, other = (
        _wanted(asked("text_input", " ".join(["w5"] * n), max_tokens=30), engine) for n in (60, 2, 34)
    )
    assert (long.max_tokens, short.max_tokens, other.max_tokens) == (4, 30, 30)
    assert long.key != short.key == other.key


def test_a_text_of_which_nothing_is_left_is_refused_alone(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.front import TritonPythonModel

    def encode(texts: list[str], limit: int | None = None) -> dict[str, np.ndarray]:
        lengths = np.array([len(text.replace("?", "")) for text in texts])
        return {"attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)}

    model: Any = TritonPythonModel()
    model._told, model._tokenizer, model._dials = {"special_tokens": 0}, SimpleNamespace(encode=encode), Dials()
    assert model._texts(asked("TEXT", "a?")) == ["a?"]
    with pytest.raises(InputError, match="makes no tokens"):
        model._texts(asked("TEXT", "??"))
    model._answer = lambda batch, dials: np.arange(len(batch))
    model._respond = lambda rows: rows
    backend.TritonError, backend.InferenceResponse = str, lambda error: error
    first, refused, last = model.execute([asked("TEXT", text) for text in ("a", "?", "b")])
    assert (first.tolist(), last.tolist()) == ([0], [1]) and "makes no tokens" in refused


def test_pairs_of_unequal_rows_are_refused_alone(backend: Any) -> None:
    from trimtab.compiler.packaging.triton.served.front import TritonPythonModel

    def pairs(first: int, second: int) -> Any:
        rows = {"TEXT": first, "TEXT_PAIR": second}
        return SimpleNamespace(given={n: np.array([[b"w"]] * count, object) for n, count in rows.items()})

    model: Any = TritonPythonModel()
    model._told, model._dials = {"special_tokens": 2}, Dials()
    model._answer = lambda batch, dials: np.arange(len(batch))
    model._respond = lambda rows: rows
    backend.TritonError, backend.InferenceResponse = str, lambda error: error
    first, refused, more, last = model.execute([pairs(2, 2), pairs(1, 2), pairs(3, 1), pairs(1, 1)])
    assert (first.tolist(), last.tolist()) == ([0, 1], [2])
    assert "TEXT has 1 rows and TEXT_PAIR 2" in refused and "TEXT has 3 rows and TEXT_PAIR 1" in more
    assert model._texts(pairs(1, 1)) == [("w", "w")]


def test_each_instance_has_its_gpu(backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from trimtab.compiler.packaging.triton.served import session

    monkeypatch.setattr(session.ort, "InferenceSession", lambda path, options, providers: providers)
    told = {"threads": 1, "entries": {}, "library": None}
    told["providers"] = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    found = session.open_session(tmp_path, told, "1")
    assert found == [("CUDAExecutionProvider", {"device_id": "1"}), ("CPUExecutionProvider", {})]
