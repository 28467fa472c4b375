"""Several engines as one, and a decoder's cache between them: ONNX Runtime's sessions stand in for engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exits import Exiting
from rewrite import canonical, session
from seeds import seeded
from stand_ins import stand_in
from zoo import exported, feeds

from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.generation import generate
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.compiler.targets.tensorrt.chain import Chain, choose
from trimtab.compiler.targets.tensorrt.info import EngineFile, EngineInfo, ProfileInfo
from trimtab.compiler.targets.tensorrt.prepare import Prepared, prepare
from trimtab.compiler.targets.tensorrt.segments import segments_of
from trimtab.compiler.targets.tensorrt.sizes import sizes_at
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import save_graph

ENCODER = Workload(batch=(1, 2, 4), tokens=(1, 8, 16))
DECODER = Workload(batch=(1, 2, 4), tokens=(1, 8, 16), past=(0, 4, 24))


def chain(prepared: Prepared, whole: Path) -> tuple[Chain, list[int]]:
    """Stand-ins for the engines of `prepared`; and the numbers of the profiles that they will run in."""
    used: list[int] = []
    stages = [
        stand_in(path, {profile.name: profile.shapes for profile in profiles}, used)
        for path, profiles in zip(prepared.models, prepared.profiles, strict=True)
    ]
    dense = session(whole)
    return Chain(stages, [t.name for t in dense.get_inputs()], [t.name for t in dense.get_outputs()]), used


def canonical_file(family: str, folder: Path, exporter: str = "dynamo") -> Path:
    save_graph(canonical(exported(family, exporter)), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(("family", "segments"), [("bert", 3), ("llama", 2), ("vit", 2), ("t5", 2), ("gpt2", 2)])
def test_a_model_in_several_engines_computes_the_same(tmp_path: Path, family: str, segments: int) -> None:
    model = canonical_file(family, tmp_path)
    scratch = tmp_path / "parts"
    scratch.mkdir()
    prepared = prepare(model, ENCODER, scratch, plugins=False, segments=segments)
    assert len(prepared.models) == segments
    weights = [sum(np.prod(t.dims) for t in load_proto(path).graph.initializer) for path in prepared.models]
    assert min(weights) > 1000  # each has layers of its own
    runner, _ = chain(prepared, model)
    rng, dense = seeded(), session(model)
    for batch, tokens in ((1, 1), (3, 9), (4, 16)):
        given = feeds(family, batch, tokens, rng)
        (want,) = dense.run(None, given)
        (got,) = runner.run(given).values()
        np.testing.assert_allclose(got, want, atol=2e-5)


def load_proto(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("exporter", ["cached", "genai"])
def test_a_decoder_goes_on_from_its_cache(tmp_path: Path, segments: int, exporter: str) -> None:
    """Its profiles in turn, prompts of unlike length, and what one step puts out is not what the next writes over."""
    model = exported("llama", exporter)
    prepared = prepare(model, DECODER, tmp_path, plugins=False, segments=segments)
    assert [profile.name for profile in prepared.profiles[0]] == ["prompt", "step"]
    runner, used = chain(prepared, model)
    prompts = [[5, 6, 7, 8, 9], [4, 3], [11, 12, 13]]
    found = list(generate(runner, prompts, max_new_tokens=8))
    wanted = list(generate(OnnxRuntimeRunner(model), prompts, max_new_tokens=8))
    np.testing.assert_array_equal(np.stack(found), np.stack(wanted))
    assert used == [0] * segments + [1] * 7 * segments


def test_samples_leave_between_engines(tmp_path: Path) -> None:
    """Engines have outputs that go when they run again; one whose samples have all left is not run."""
    used: list[int] = []
    exiting = Exiting("bert", tmp_path, seeded())
    ranks = {t.name: len(t.shape) for path in exiting.parts for t in session(path).get_inputs()}
    wide = {name: ((1,) * rank, (1,) * rank, (99,) * rank) for name, rank in ranks.items()}
    stages = [stand_in(path, {"all": wide}, used) for path in exiting.parts]
    runner = Chain(stages, exiting.inputs, ["logits"], hook=exiting.hook)
    for leave, runs in (([0, 1, 2, 1, 0, 2], 3), ([0, 1, 1], 2), ([0, 0], 1), ([2], 3)):
        given = exiting.feeds(len(leave), 7, np.array(leave))
        used.clear()
        np.testing.assert_allclose(runner.run(given)["logits"], exiting.alone(given), rtol=0, atol=2e-5)
        assert len(used) == runs


def test_a_generation_lets_go_of_its_cache(tmp_path: Path) -> None:
    """At its end, and where nobody wants the rest; the engine itself stays."""
    model = exported("llama", "cached")
    runner, _ = chain(prepare(model, DECODER, tmp_path, plugins=False, segments=2), model)
    list(generate(runner, [[5, 6, 7]], max_new_tokens=3))
    rest = generate(runner, [[5, 6, 7]], max_new_tokens=3)
    next(rest)
    forks = [fork for stage in runner.stages for fork in stage.forks]
    assert [fork.closed for fork in forks] == [True, True, False, False] * 2
    rest.close()
    assert all(fork.closed for fork in forks)
    assert not any(stage.closed for stage in runner.stages)


def test_engines_tell_the_outputs_of_the_whole_model(tmp_path: Path) -> None:
    """What one engine hands to the next may be an output too, such as hidden states; the order is the model's."""
    pytest.importorskip("tensorrt_rtx")
    graph = canonical(exported("bert", "dynamo"))
    handed = segments_of(graph, 2)[0].outputs[0].name
    graph.outputs.insert(0, graph.tensors()[handed])
    save_graph(graph, tmp_path / "model.onnx")
    options = EngineOptions(segments=2)
    get_target("tensorrt-rtx").build(tmp_path / "model.onnx", ENCODER, tmp_path / "engine", options=options)
    info = EngineInfo.read(tmp_path / "engine")
    assert info.outputs == tuple(tensor.name for tensor in graph.outputs)
    assert info.inputs == tuple(tensor.name for tensor in graph.inputs)
    assert {t.name for t in info.engines[0].outputs} & {t.name for t in info.engines[1].inputs} >= {handed}
    assert all(any(name == t.name for e in info.engines for t in e.outputs) for name in info.outputs)


LOAD_ONCE = """
import numpy as np
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from trimtab.compiler.targets.tensorrt import build_engine

class Runner:
    def __init__(self, engine): pass
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def get_input_metadata(self, use_numpy_dtypes=None):
        found = TensorMetadata()
        for name, dtype in (("ids", DataType.INT64), ("half", DataType.FLOAT16), ("brain", DataType.BFLOAT16)):
            told = dtype if use_numpy_dtypes is False else DataType.to_dtype(dtype, "numpy")
            found.add(name, dtype=told, shape=(1, 3))
        return found
    def infer(self, feeds, check_inputs, copy_outputs_to_host):
        assert not copy_outputs_to_host  # numpy has no bfloat16 to copy to
        assert {n: (a.dtype.itemsize, a.shape) for n, a in feeds.items()} == {
            "ids": (8, (1, 3)), "half": (2, (1, 3)), "brain": (2, (1, 3))}
        print("ran")

build_engine.TrtRunner, build_engine.EngineFromBytes = Runner, bytes
from pathlib import Path
build_engine.load_once(Path(__file__), {"ids": [1, 3], "half": [1, 3], "brain": [1, 3]})
"""


def test_the_finished_engine_is_run_on_zeros_of_its_types(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "child.py").write_text(LOAD_ONCE)
    env = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([sys.executable, tmp_path / "child.py"], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("ran\n"), done.stderr


def test_generations_at_the_same_time_have_caches_of_their_own(tmp_path: Path) -> None:
    model = exported("llama", "cached")
    runner, _ = chain(prepare(model, DECODER, tmp_path, plugins=False, segments=1), model)
    alone = [list(generate(runner, [prompt], max_new_tokens=6)) for prompt in ([5, 6, 7], [9])]
    both = [generate(runner, [prompt], max_new_tokens=6) for prompt in ([5, 6, 7], [9])]
    together = [[], []]
    for _ in range(6):
        for number, each in enumerate(both):
            together[number].append(next(each))
    assert together == alone


def test_calls_of_many_threads_wait_for_each_other(tmp_path: Path) -> None:
    """An engine's outputs go when it runs again, so a call that did not wait would show."""
    model = exported("llama", "cached")
    runner, _ = chain(prepare(model, DECODER, tmp_path, plugins=False, segments=2), model)
    rng = seeded()
    prompts = [rng.integers(3, 100, (1, rng.integers(1, 9))).tolist() for _ in range(16)]

    def answer(prompt: list[list[int]]) -> list[int]:
        return [int(token) for (token,) in generate(runner, prompt, max_new_tokens=5)]

    def whole(prompt: list[list[int]]) -> np.ndarray:
        ids = np.array(prompt, np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        given |= {n: np.zeros((1, *shape), np.float32) for n, shape in pasts.items() if n in runner.inputs}
        return runner.run({name: given[name] for name in runner.inputs})["logits"]

    pasts = {t.name: (t.shape[1], 0, t.shape[3]) for s in runner.stages for t in s.info.inputs if "past" in t.name}
    calls = [(how, prompt) for prompt in prompts for how in (answer, whole)]
    wanted = [how(prompt) for how, prompt in calls]
    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(lambda call: call[0](call[1]), calls), wanted, strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_cache_that_is_too_short_is_told_at_once(tmp_path: Path) -> None:
    model = exported("llama", "cached")
    runner, _ = chain(prepare(model, DECODER, tmp_path, plugins=False, segments=1), model)
    with pytest.raises(TargetError, match=r"cache takes 24 tokens, and 40 are asked for.*past"):
        runner.steps(1, 40)
    encoder = canonical_file("bert", tmp_path)
    other, _ = chain(prepare(encoder, ENCODER, tmp_path, plugins=False, segments=1), encoder)
    with pytest.raises(TargetError, match="no cache"):
        other.steps(1, 4)


def test_shapes_outside_of_the_profile_are_refused_by_name(tmp_path: Path) -> None:
    model = canonical_file("bert", tmp_path)
    runner, used = chain(prepare(model, ENCODER, tmp_path, plugins=False, segments=1), model)
    with pytest.raises(TargetError, match=r"'input_ids' has the shape \[2, 17\].*\[1, 1\] to \[4, 16\]"):
        runner.run(feeds("bert", 2, 17, seeded()))
    with pytest.raises(TargetError, match="takes the inputs input_ids"):
        runner.run({"ids": np.zeros((1, 2), np.int64)})
    assert not used


def test_the_narrowest_profile_is_chosen() -> None:
    whole = ProfileInfo(name="prompt", shapes={"x": ((1, 0), (1, 4), (4, 9))})
    step = ProfileInfo(name="step", shapes={"x": ((1, 1), (1, 1), (4, 1))})
    info = EngineFile(file="f", inputs=(), outputs=(), profiles=(whole, step))
    assert choose(info, {"x": (2, 1)}) == 1 and choose(info, {"x": (2, 2)}) == 0


def test_sizes_are_found_through_what_is_computed_of_them() -> None:
    graph = canonical(exported("t5"))
    last = graph.outputs[0].inputs[0].inputs[0]
    found = sizes_at(graph, {tensor.name: (3, 7) for tensor in graph.inputs})
    assert found[last.name] == (3, 7, 40)
    assert graph.outputs[0].shape[0] == "batch"


def test_more_engines_than_layers_are_refused(tmp_path: Path) -> None:
    model = canonical_file("bert", tmp_path)
    with pytest.raises(TargetError, match="5 engines of a model in which 3 layers were found"):
        prepare(model, ENCODER, tmp_path, plugins=False, segments=5)


def test_every_segment_is_built(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = canonical_file("bert", tmp_path)
    options = EngineOptions(segments=3)
    files = get_target("tensorrt-rtx").build(model, ENCODER, tmp_path / "engine", options=options)
    assert [file.name for file in files] == [*(f"model.{n}.engine" for n in range(3)), "engine.json"]
    assert {file.name for file in (tmp_path / "engine").iterdir()} == {file.name for file in files}
    engines = json.loads(files[-1].read_text())["engines"]
    made = {tensor["name"] for tensor in engines[0]["outputs"]}
    assert made & {tensor["name"] for tensor in engines[1]["inputs"]}
    assert [tensor["name"] for tensor in engines[-1]["outputs"]] == ["logits"]
