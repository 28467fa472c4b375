"""The task of a model: read as transformers and sentence-transformers read it, and served as they would answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heads import ask_front, head_model, pair_tokenizer, pairs, save_onnx, stub_backend, texts, torch_logits
from scipy.special import expit, softmax

from trimtab.compiler import compile_model, load
from trimtab.compiler.packaging.triton import package_triton
from trimtab.compiler.sources import open_source
from trimtab.compiler.task import Head, Task, find_task, read_head
from trimtab.passes.errors import ModelError

RECIPE = {"passes": [], "workload": {"batch": [1, 4, 8], "tokens": [1, 16, 48]}, "threads": 1}
SEED = int(np.random.default_rng().integers(1 << 30))


@pytest.fixture(autouse=True)
def _seed() -> None:
    print(f"seed {SEED}")


@dataclass
class Named:
    name: str
    shape: tuple[int | str, ...] | None


def task_of(width: int | str, **config: Any) -> Task | None:
    return find_task((), [Named("logits", ("batch", width))], read_head(config))


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(("width", "config", "expected"), [
    (3, {}, ("classes", "softmax")),
    (2, {"problem_type": "single_label_classification"}, ("classes", "softmax")),
    (1, {}, ("score", "sigmoid")),
    (1, {"problem_type": "regression"}, ("score", "identity")),
    (4, {"problem_type": "regression"}, ("score", "identity")),
    (1, {"problem_type": "regression", "sentence_transformers": {"activation_fn": SIGMOID}}, ("score", "sigmoid")),
    (1, {"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.0"}}, ("score", "identity")),
    (1, {"sbert_ce_default_activation_function": IDENTITY}, ("score", "identity")),
    (1, {"sbert_ce_default_activation_function": None}, ("score", "sigmoid")),
    (1, {"sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}, ("score", "tanh")),
    (5, {"problem_type": "multi_label_classification"}, ("labels", "sigmoid")),
    (1, {"problem_type": "multi_label_classification"}, ("labels", "sigmoid")),
    (3, {"sentence_transformers": {"activation_fn": IDENTITY}}, ("classes", "softmax")),
    (3, {"sentence_transformers": {"activation_fn": SIGMOID}}, ("labels", "sigmoid")),
    ("width", {"id2label": {"0": "LABEL_0"}}, ("score", "sigmoid")),
    ("width", {"id2label": {"0": "a", "1": "b"}}, ("classes", "softmax")),
])  # fmt: skip
def test_what_the_files_say(width: int | str, config: dict[str, Any], expected: tuple[str, str]) -> None:
    task = task_of(width, **config)
    assert task is not None and (task.kind, task.activation) == expected


def test_the_file_of_sentence_transformers_6_counts_before_older_keys() -> None:
    head = read_head({"sentence_transformers": {"activation_fn": SIGMOID}}, {"activation_fn": IDENTITY})
    assert head == Head(activation="identity")


def test_tasks_of_other_outputs() -> None:
    def kind(*outputs: Named, inputs: tuple[Named, ...] = ()) -> str | None:
        task = find_task(inputs, outputs)
        return task and task.kind

    states, embedding = Named("last_hidden_state", ("batch", "tokens", 8)), Named("sentence_embedding", ("batch", 8))
    tokens = Named("logits", ("batch", "tokens", 50))
    assert (kind(states), kind(states, embedding), kind(tokens)) == ("states", "embedding", "tokens")
    assert kind(tokens, inputs=(Named("past_key_values.0.key", None),)) == "text"
    assert kind(Named("start_logits", ("batch", "tokens"))) is None


def test_activations() -> None:
    logits = np.random.default_rng(SEED).normal(0, 30, (5, 3)).astype(np.float32)
    logits[0] = (-300, 0, 300)
    for activation, reference in (("sigmoid", expit), ("softmax", lambda x: softmax(x, -1)), ("tanh", np.tanh)):
        values = Task("score", "logits", activation).apply(logits)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, reference(logits.astype(np.float64)), rtol=1e-5, atol=1e-30)
    assert Task("score", "logits").apply(logits) is logits
    for other in ("gelu", "my_package.Scale"):
        with pytest.raises(ModelError, match=other):
            Task("score", "logits", other).apply(logits)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules: dict[str, Any] = {}
    stub_backend(modules)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in [name for name in sys.modules if name.startswith("trimtab.compiler.packaging.triton.served.")]:
        del sys.modules[name]


def built(onnx: Path, folder: Path) -> tuple[Any, Path]:
    """A build without passes, loaded; and its repository for Triton."""
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    build = compile_model(onnx, RECIPE, folder / "build")
    return load(build.path), package_triton(build, folder / "repository", name="m", backend="python").path


def test_a_reranker_answers_as_cross_encoder_does(tmp_path: Path, backend: None) -> None:
    """Saved by the library itself, with an activation that is not the default."""
    import torch
    from sentence_transformers import CrossEncoder

    given = pairs(np.random.default_rng(SEED), 16)
    model = head_model("electra", SEED, num_labels=1)
    model.classifier.out_proj.weight.data /= torch_logits(model, given).std()  # some models hardly tell pairs apart
    model.save_pretrained(tmp_path / "plain")
    pair_tokenizer().save_pretrained(tmp_path / "plain")
    encoder = CrossEncoder(str(tmp_path / "plain"), device="cpu", activation_fn=torch.nn.Identity())
    encoder.save_pretrained(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved")
    assert source.head.activation == "identity"
    engine, repository = built(tmp_path / "saved", tmp_path)
    expected = CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(given, show_progress_bar=False)
    assert expected.std() == pytest.approx(1, abs=1e-3)
    scores = engine.manifest.task.apply(engine.run(engine.tokenize(given[:8]))["logits"])
    np.testing.assert_allclose(scores[:, 0], expected[:8], rtol=1e-3, atol=1e-4)
    served = ask_front(repository, "m", TEXT=[a for a, _ in given], TEXT_PAIR=[b for _, b in given])
    np.testing.assert_allclose(served["SCORE"][:, 0], expected, rtol=1e-3, atol=1e-4)


def test_a_regression_is_served_as_it_is_and_a_default_by_the_sigmoid(tmp_path: Path, backend: None) -> None:
    from sentence_transformers import CrossEncoder

    given = pairs(np.random.default_rng(SEED), 8)
    regression = head_model("roberta", SEED, num_labels=1, problem_type="regression", type_vocab_size=1)
    engine, repository = built(save_onnx(regression, tmp_path / "regression"), tmp_path / "regression")
    want = torch_logits(regression, given)
    np.testing.assert_allclose(engine.run(engine.tokenize(given))["logits"], want, rtol=1e-3, atol=1e-4)
    asked = {"TEXT": [a for a, _ in given], "TEXT_PAIR": [b for _, b in given]}
    np.testing.assert_allclose(ask_front(repository, "m", **asked)["SCORE"], want, rtol=1e-3, atol=1e-4)

    reranker = head_model("distilbert", SEED, num_labels=1)
    reranker.save_pretrained(tmp_path / "folder")
    pair_tokenizer().save_pretrained(tmp_path / "folder")
    want = CrossEncoder(str(tmp_path / "folder"), device="cpu").predict(given, show_progress_bar=False)
    _, repository = built(save_onnx(reranker, tmp_path / "reranker"), tmp_path / "reranker")
    np.testing.assert_allclose(ask_front(repository, "m", **asked)["SCORE"][:, 0], want, rtol=1e-3, atol=1e-4)


def test_labels_and_classes_as_transformers_pipelines_have_them(tmp_path: Path, backend: None) -> None:
    names = {i: f"label {i}" for i in range(5)}
    common = {"num_labels": 5, "id2label": names, "label2id": {name: i for i, name in names.items()}}
    sentences = texts(np.random.default_rng(SEED), 12)
    for kind, config in (("labels", {"problem_type": "multi_label_classification"}), ("classes", {})):
        model = head_model("bert", SEED, **common, **config)
        engine, repository = built(save_onnx(model, tmp_path / kind), tmp_path / kind)
        assert engine.manifest.task.kind == kind
        logits = torch_logits(model, sentences).astype(np.float64)
        answer = ask_front(repository, "m", TEXT=sentences)
        if kind == "classes":
            want = softmax(logits, 1)
            clear = np.ptp(np.sort(want)[:, -2:], axis=1) > 1e-3
            found = [name.decode() for name in answer["LABEL"][clear, 0]]
            assert found == [names[i] for i in logits[clear].argmax(1)]
        else:
            want = expit(logits)
            clear = np.abs(want - 0.5).min(1) > 1e-3
            for given, row in zip(answer["LABELS"][clear, 0], want[clear], strict=True):
                assert json.loads(given) == [names[i] for i in np.flatnonzero(row > 0.5)]
        np.testing.assert_allclose(answer["PROBABILITIES"], want, rtol=1e-3, atol=1e-5)


def test_an_activation_that_no_one_computes_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    onnx = save_onnx(
        head_model("bert", SEED, num_labels=1), tmp_path, sentence_transformers={"activation_fn": "my_package.Scale"}
    )
    build = compile_model(onnx, RECIPE, tmp_path / "build")  # tensors in, logits out, are right without it
    with pytest.raises(ModelError, match=r"my_package\.Scale"):
        package_triton(build, tmp_path / "repository", backend="python")
