"""The real tritonserver on what trimtab packages: text in, the engine's own answers out, over HTTP and gRPC."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import triton_server
import zoo
from dialled import Dimmer
from scipy.special import softmax
from seeds import seeded

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import open_build
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.engine import Engine
from trimtab.compiler.generation import Sampling
from trimtab.compiler.generation.text import generate_text
from trimtab.compiler.packaging.triton import package_triton
from trimtab.compiler.packaging.triton.carried import write_code
from trimtab.compiler.packaging.triton.config import model_config, write_config
from trimtab.compiler.packaging.triton.engines import ensemble_config
from trimtab.compiler.serving.example import ask
from trimtab.compiler.serving.process import Ports, Served, choose_ports, serve
from trimtab.compiler.targets.segmented.route import Route
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import load_graph, save_graph
from trimtab.passes.graph.cut import cut
from trimtab.plugins.library import library_path

http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
grpc = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = pytest.mark.slow
RECIPE = {"passes": [], "workload": {"batch": [1, 4, 8], "tokens": [1, 16, 48]}, "threads": 1}
MODELS = {
    "classes": "bert",
    "dialled": "bert",
    "embedding": "distilbert",
    "states": "distilbert",
    "text": "llama",
    "dialled_text": "llama",
    "sparse": "llama",
}
SPARSE = {"ffn-topk": {"density": 0.2, "take": 0.4, "rank": 8, "dense_above": 1}}
"""Makes the model use the dialect, whose kernels the server then loads."""

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # padding to the longest of a batch changes the order of sums


@dataclass
class Running:
    """The server, and the engines in process that it must agree with."""

    served: Served
    engines: dict[str, Engine]
    http: Any
    grpc: Any
    repository: Path

    @property
    def metrics(self) -> str:
        return ask(f"http://127.0.0.1:{self.served.ports.metrics}/metrics")

    def metric(self, name: str, model: str) -> float:
        lines = [line for line in self.metrics.splitlines() if line.startswith(f'{name}{{model="{model}"')]
        return float(lines[0].split()[-1])


def _let_it_ask(front: Path) -> None:
    """Make a front ask the engine's model, as it does where that is of another backend."""
    path = front / "1" / "served.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"session": None}))


def _chain(folder: Path, model: Path) -> None:
    """An ensemble of two models, which are `model` cut in two."""
    graph = load_graph(model)
    point = next(node for node in graph.nodes if node.op == "LayerNormalization").outputs[0]
    names, sides = [], []
    for number, segment in enumerate(cut(graph, [point])):
        name, batched = f"chain_{number}", False
        version = folder / name / "1"
        version.mkdir(parents=True)
        save_graph(segment.graph, version / "model.onnx")
        write_code("engine", version)
        told = {"threads": 1, "entries": {}, "providers": ["CPUExecutionProvider"], "library": None, "batched": batched}
        inputs, outputs = ([TensorInfo.of(t) for t in side] for side in (segment.graph.inputs, segment.graph.outputs))
        told["dials"] = {"dials": [], "path": []}
        told["limits"] = {"inputs": [t.model_dump(mode="json") for t in inputs], "packed": [], "positions": None}
        (version / "served.json").write_text(json.dumps(told))
        write_config(model_config(name, "python", inputs, outputs, batch=0), folder / name)
        names.append(name)
        sides.append(([t.name for t in inputs], [t.name for t in outputs]))
    (folder / "chain" / "1").mkdir(parents=True)
    inputs, outputs = ([TensorInfo.of(t) for t in side] for side in (graph.inputs, graph.outputs))
    route = Route.of(sides, [t.name for t in inputs], [t.name for t in outputs])
    write_config(ensemble_config("chain", inputs, outputs, names, route, batch=0), folder / "chain")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        server = triton_server.server(patch)
    folder, engines = tmp_path_factory.mktemp("served"), {}
    (folder / "repo").mkdir()
    calibration, rng = folder / "texts.txt", np.random.default_rng(0)
    calibration.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(4, 100, 12)) for _ in range(30)))
    for name, family in MODELS.items():
        source = folder / f"{name}-model"
        if name == "embedding":
            zoo.save_pretrained(family, source)
            (source / "1_Pooling").mkdir()
            (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
        else:
            source = triton_server.exported(family, source)
        passes = [SPARSE] if name == "sparse" else [Dimmer()] if name.startswith("dialled") else []
        build = compile_model(
            source, RECIPE | {"passes": passes}, folder / name, data=calibration if name == "sparse" else None
        )
        engines[name] = load(build.path)
        package = package_triton(open_build(build.path), folder / f"{name}-repo", backend="python")
        assert package.kind == {"sparse": "text", "dialled": "classes", "dialled_text": "text"}.get(name, name)
        if name == "states":
            _let_it_ask(package.path / name)
        for part in package.path.iterdir():
            part.rename(folder / "repo" / part.name)
    _chain(folder / "repo", folder / "states" / "model" / "model.onnx")
    host = "127.0.0.1"
    ports = choose_ports(host, Ports(0, 0, 0))
    with (
        serve(server, folder / "repo", folder / "log", host=host, ports=ports) as served,
        http.InferenceServerClient(f"{host}:{ports.http}", concurrency=16) as over_http,
        grpc.InferenceServerClient(f"{host}:{ports.grpc}") as over_grpc,
    ):
        yield Running(served, engines, over_http, over_grpc, folder / "repo")


def words(rng: np.random.Generator, count: int) -> list[str]:
    """Texts of 1 to 30 words, and one that is longer than the model takes."""
    texts = [" ".join(f"w{i}" for i in rng.integers(4, 100, rng.integers(1, 30))) for _ in range(count)]
    return [*texts[:-1], " ".join(["w7"] * 80)] if count > 2 else texts


def infer(client: Any, module: Any, model: str, texts: list[str], outputs: list[str]) -> list[np.ndarray]:
    given = module.InferInput("TEXT", [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()] for text in texts], object))
    found = client.infer(model, [given])
    return [found.as_numpy(name) for name in outputs]


def expected(engine: Engine, text: str) -> dict[str, np.ndarray]:
    return {name: value[0] for name, value in engine.run(engine.tokenize([text])).items()}


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_labels_are_those_of_the_engine(running: Running, over: str) -> None:
    client, module = (running.http, http) if over == "http" else (running.grpc, grpc)
    engine, texts = running.engines["classes"], words(seeded(), 5)
    labels, probabilities = infer(client, module, "classes", texts, ["LABEL", "PROBABILITIES"])
    assert labels.shape == (5, 1) and probabilities.shape == (5, 3)
    for text, (label,), row in zip(texts, labels, probabilities, strict=True):
        wanted = softmax(expected(engine, text)["logits"].astype(float))
        np.testing.assert_allclose(row, wanted, **TOLERANCE)
        assert engine.manifest.labels is not None
        if np.ptp(np.sort(wanted)[-2:]) > 1e-3:  # else rounding may decide
            assert label.decode() == engine.manifest.labels[wanted.argmax()]


@pytest.mark.parametrize("over", ["http", "grpc"])
def test_embeddings_are_those_of_the_engine(running: Running, over: str) -> None:
    client, module = (running.http, http) if over == "http" else (running.grpc, grpc)
    texts = words(seeded(), 4)
    (pooled,) = infer(client, module, "embedding", texts, ["EMBEDDING"])
    (mean,) = infer(client, module, "states", texts, ["EMBEDDING"])
    for i, text in enumerate(texts):
        wanted = expected(running.engines["embedding"], text)["sentence_embedding"]
        np.testing.assert_allclose(pooled[i], wanted, **TOLERANCE)
        wanted = expected(running.engines["states"], text)["last_hidden_state"].mean(0)
        np.testing.assert_allclose(mean[i], wanted, **TOLERANCE)


def test_tensors_are_those_of_the_engine(running: Running) -> None:
    engine, rng = running.engines["classes"], seeded()
    feeds = zoo.feeds("bert", 3, 11, rng)
    inputs = []
    for name, array in feeds.items():
        inputs.append(http.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    found = running.http.infer("classes_engine", inputs).as_numpy("logits")
    np.testing.assert_array_equal(found, engine.run(feeds)["logits"])


def floats(name: str, values: list[float]) -> Any:
    given = http.InferInput(name, [len(values), 1], "FP32")
    given.set_data_from_numpy(np.array(values, np.float32)[:, None])
    return given


@pytest.mark.parametrize(
    ("asked", "turned"),
    [
        ({}, {}),
        ({"SPEED": [0.0, 0.75]}, {"speed": [0.0, 0.75]}),
        ({"DIM": [0.5, 0.1], "LIFT": [-1.0, 1.0]}, {"dials": {"dim": [0.5, 0.1], "lift": [-1, 1]}}),
    ],
    ids=str,
)
def test_requests_turn_the_dials(running: Running, asked: dict[str, list[float]], turned: dict[str, Any]) -> None:
    engine, texts = running.engines["dialled"], words(seeded(), 2)
    given = http.InferInput("TEXT", [2, 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()] for text in texts], object))
    inputs = [given, *(floats(name, values) for name, values in asked.items())]
    found = running.http.infer("dialled", inputs).as_numpy("PROBABILITIES")
    logits = engine.run(engine.tokenize(texts), **turned)["logits"]
    np.testing.assert_allclose(found, softmax(logits.astype(float), -1), **TOLERANCE)
    feeds, inputs = engine.tokenize(texts), []
    for name, array in feeds.items():
        inputs.append(http.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    if "SPEED" not in asked:  # which the engine itself does not know
        inputs += [floats(name.lower(), values) for name, values in asked.items()]
        found = running.http.infer("dialled_engine", inputs).as_numpy("logits")
        np.testing.assert_allclose(found, logits, **TOLERANCE)


def test_impossible_dials_are_refused_alone(running: Running) -> None:
    for name, value in (("SPEED", 1.5), ("SPEED", float("nan")), ("DIM", 2.0)):
        given = http.InferInput("TEXT", [1, 1], "BYTES")
        given.set_data_from_numpy(np.array([[b"w5"]], object))
        with pytest.raises(InferenceServerException, match="give a number from 0 to"):
            running.http.infer("dialled", [given, floats(name, [value])])


def test_engines_that_run_one_after_the_other(running: Running) -> None:
    feeds = zoo.feeds("distilbert", 2, 9, seeded())
    inputs = []
    for name, array in feeds.items():
        inputs.append(grpc.InferInput(name, array.shape, "INT64"))
        inputs[-1].set_data_from_numpy(array)
    found = running.grpc.infer("chain", inputs).as_numpy("last_hidden_state")
    wanted = running.engines["states"].run(feeds)["last_hidden_state"]
    np.testing.assert_allclose(found, wanted, **TOLERANCE)


def test_concurrent_clients_are_joined_and_each_gets_its_own(running: Running) -> None:
    engine, texts = running.engines["classes"], words(seeded(), 64)
    wanted = [softmax(expected(engine, text)["logits"].astype(float)) for text in texts]
    names = "nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count"
    found: dict[int, np.ndarray] = {}

    def ask_some(client: int) -> None:
        with http.InferenceServerClient(f"127.0.0.1:{running.served.ports.http}") as own:
            for i in range(client, len(texts), 16):
                found[i] = infer(own, http, "classes", [texts[i]], ["PROBABILITIES"])[0][0]

    for _ in range(30):  # requests are joined where they meet, which the machine may keep them from for a while
        before = [running.metric(name, "classes") for name in names]
        found.clear()
        threads = [threading.Thread(target=ask_some, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert len(found) == len(texts)
        for i, row in enumerate(wanted):
            np.testing.assert_allclose(found[i], row, **TOLERANCE)
        end = time.monotonic() + 30  # the server counts a request a moment after it has answered
        while True:
            requests, samples, calls = (running.metric(n, "classes") - b for n, b in zip(names, before, strict=True))
            if min(requests, samples) >= len(texts) or time.monotonic() > end:
                break
            time.sleep(0.05)
        assert samples == requests == len(texts)
        if calls < samples:  # some ran together
            return
    pytest.fail("no requests were joined")


def test_the_native_kernels_are_served(running: Running) -> None:
    if library_path() is None:
        pytest.skip("trimtab was installed without a C++ compiler")
    said = json.loads((running.repository / "sparse" / "1" / "served.json").read_text())
    maps = [Path(f"/proc/{child.pid}/maps") for child in psutil.Process(running.served.process.pid).children()]
    told = ask(f"{running.served.url}/v2/models/sparse/generate", json.dumps({"text_input": "w8 w9", "max_tokens": 6}))
    *_, (wanted,) = generate_text(running.engines["sparse"], ["w8 w9"], max_tokens=6)
    assert json.loads(told)["text_output"] == wanted.text
    assert any(f"sparse/1/{said['library']}" in path.read_text() for path in maps)


def test_health(running: Running) -> None:
    for client in (running.http, running.grpc):
        assert client.is_server_live() and client.is_server_ready()
        assert all(client.is_model_ready(name) for name in (*MODELS, "classes_engine"))
    assert running.metric("nv_inference_request_success", "text") >= 0


def test_bad_requests_fail_alone(running: Running) -> None:
    given = http.InferInput("TEXT", [1, 1], "BYTES")
    given.set_data_from_numpy(np.array([[b"\xff\xfe"]], object))
    with pytest.raises(InferenceServerException, match="not UTF-8") as caught:
        running.http.infer("classes", [given])
    assert caught.value.status() == "400"
    over_grpc = grpc.InferInput("TEXT", [1, 1], "BYTES")
    over_grpc.set_data_from_numpy(np.array([[b"caf\xe9"]], object))
    with pytest.raises(InferenceServerException, match="not UTF-8") as caught:
        running.grpc.infer("classes", [over_grpc])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8"):
        infer(running.http, http, "classes", ["w5"] * 9, [])
    ids = http.InferInput("input_ids", [1, 4], "INT64")
    ids.set_data_from_numpy(np.full((1, 4), 10**6))
    mask, types = (http.InferInput(name, [1, 4], "INT64") for name in ("attention_mask", "token_type_ids"))
    for tensor in (mask, types):
        tensor.set_data_from_numpy(np.zeros((1, 4), np.int64))
    with pytest.raises(InferenceServerException, match="'input_ids' holds 1000000 at") as caught:
        running.http.infer("classes_engine", [ids, mask, types])
    assert caught.value.status() == "400"
    assert infer(running.http, http, "classes", ["w5"], ["LABEL"])[0].shape == (1, 1)


def stream(running: Running, **settings: Any) -> list[tuple[str, str]]:
    """(text, reason) of every response to one request over gRPC; an error is raised."""
    kinds = {"text_input": "BYTES", "stop": "BYTES", "stream": "BOOL", "max_tokens": "INT32", "top_k": "INT32"}
    kinds |= {"temperature": "FP32", "top_p": "FP32", "seed": "INT64"}
    types = {"BYTES": object, "BOOL": bool, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
    inputs = []
    for name, value in settings.items():
        inputs.append(grpc.InferInput(name, [1, 1], kinds[name]))
        given = value.encode() if isinstance(value, str) else value
        inputs[-1].set_data_from_numpy(np.array([[given]], types[kinds[name]]))
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    pieces = []
    with grpc.InferenceServerClient(f"127.0.0.1:{running.served.ports.grpc}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("text", inputs)
        while not pieces or not pieces[-1][1]:
            result, error = answers.get(timeout=60)
            if error is not None:
                raise error
            pieces.append(tuple(result.as_numpy(name)[0, 0].decode() for name in ("text_output", "finish_reason")))
    return pieces


def wanted_text(running: Running, prompt: str, **settings: Any) -> Any:
    *_, (answer,) = generate_text(running.engines["text"], [prompt], **settings)
    return answer


def test_generated_pieces_make_the_engine_s_text(running: Running) -> None:
    prompt = " ".join(f"w{i}" for i in seeded().integers(4, 100, 5))
    wanted = wanted_text(running, prompt, max_tokens=9)
    pieces = stream(running, text_input=prompt, stream=True, max_tokens=9)
    assert "".join(text for text, _ in pieces) == wanted.text
    assert pieces[-1][1] == wanted.ended and (len(pieces) > 2 or wanted.ended == "stop")
    assert stream(running, text_input=prompt, max_tokens=9) == [(wanted.text, wanted.ended)]
    drawn = {"text_input": prompt, "max_tokens": 9, "temperature": 1.5, "top_k": 20, "seed": 3}
    sampling = Sampling(temperature=1.5, top_k=20, seed=3)
    assert stream(running, **drawn)[0][0] == wanted_text(running, prompt, max_tokens=9, sampling=sampling).text


@pytest.mark.parametrize("asked", [{"dim": 0.9}, {"speed": 0.0}, {}], ids=str)
def test_generation_turns_the_dials(running: Running, asked: dict[str, float]) -> None:
    """`dim` divides the logits, so that what is drawn differs."""
    url, engine = f"{running.served.url}/v2/models/dialled_text/generate", running.engines["dialled_text"]
    drawn = {"temperature": 1.0, "seed": 3}
    given = json.dumps({"text_input": "w5 w7", "max_tokens": 12} | drawn | asked)
    dials = {name: value for name, value in asked.items() if name == "dim"}
    *_, (answer,) = generate_text(
        engine, ["w5 w7"], max_tokens=12, sampling=Sampling(**drawn), dials=dials, speed=asked.get("speed")
    )
    assert json.loads(ask(url, given))["text_output"] == answer.text


def test_generations_of_different_dials_run_together(running: Running) -> None:
    url, found = f"{running.served.url}/v2/models/dialled_text/generate", {}

    def one(dim: float) -> None:
        found[dim] = ask(url, json.dumps({"text_input": "w5 w7", "max_tokens": 5, "dim": dim}))

    threads = [threading.Thread(target=one, args=(dim,)) for dim in (0.0, 0.3, 0.6, 0.9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    *_, (answer,) = generate_text(running.engines["dialled_text"], ["w5 w7"], max_tokens=5)
    assert [json.loads(text)["text_output"] for text in found.values()] == [answer.text] * 4  # greedy: scale alone
    with pytest.raises(TargetError, match="give a number from 0 to"):
        ask(url, json.dumps({"text_input": "w5", "dim": 2.0}))


def test_generate_over_http_and_together(running: Running) -> None:
    prompts = [" ".join(["w5"] * n) for n in range(1, 7)]
    url, found = f"{running.served.url}/v2/models/text/generate", {}

    def one(prompt: str) -> None:
        found[prompt] = json.loads(ask(url, json.dumps({"text_input": prompt, "max_tokens": 6})))

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for prompt in prompts:
        wanted = wanted_text(running, prompt, max_tokens=6)
        assert (found[prompt]["text_output"], found[prompt]["finish_reason"]) == (wanted.text, wanted.ended)
    first = wanted_text(running, "w5", max_tokens=6).text.split()[0]
    told = ask(url, json.dumps({"text_input": "w5", "max_tokens": 6, "stop": [first]}))
    assert json.loads(told)["finish_reason"] == "stop" and first not in json.loads(told)["text_output"]
    streamed = ask(f"{url}_stream", json.dumps({"text_input": "w5", "max_tokens": 6, "stream": True}))
    pieces = [json.loads(line.removeprefix("data: "))["text_output"] for line in streamed.splitlines() if line]
    assert "".join(pieces) == wanted_text(running, "w5", max_tokens=6).text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"text_input": " ".join(["w5"] * 70)}, "the model takes 64"),
        ({"text_input": "w5", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "w5", "top_p": 0.0}, "top_p"),
        ({"text_input": "w5", "temperature": -1.0}, "temperature"),
    ],
)
def test_impossible_settings(running: Running, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TargetError, match=rf"generate: 400: .*{says}"):
        ask(f"{running.served.url}/v2/models/text/generate", json.dumps(settings))
    assert running.http.is_model_ready("text")
