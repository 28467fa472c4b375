"""`trimtab bench` of decoders: prompts and steps apart, each engine in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import zoo
from typer.testing import CliRunner

from trimtab.compiler import compile_model
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.checks.bench import bench
from trimtab.compiler.checks.decoders import children
from trimtab.compiler.checks.decoders.children import Children
from trimtab.compiler.checks.decoders.engines import GENAI, LLAMA
from trimtab.compiler.cli.app import app
from trimtab.passes.errors import TargetError

WORKLOAD = {"batch": [1, 1, 4], "tokens": [1, 1, 24], "past": [0, 10, 39]}
NAMES = ["compiled", "dense-fp32", "dense-int8"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("decoder")
    zoo.save_pretrained("llama", folder / "llama")
    recipe = {"passes": [{"weight-only": {"bits": 4}}], "workload": WORKLOAD, "threads": 1}
    return compile_model(folder / "llama", recipe, folder / "build")


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, ["bench", *map(str, words), "--seconds", "0"])


def interpreter(path: Path, body: str) -> Path:
    """What stands in for one with llama-cpp-python."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_prompts_and_steps_are_timed_apart(build: Build) -> None:
    found = bench(build, seconds=0)
    assert [(run.name, run.tokens, run.past) for run in found.runs] == [
        (name, tokens, past) for name in NAMES for tokens, past in ((10, 0), (1, 10))
    ]
    assert all(run.batch == 1 and run.median_ms > 0 and run.samples >= 6 for run in found.runs)
    assert all(run.ratio == 1 for run in found.runs if run.name == "compiled")
    assert all(run.memory_mb is not None and run.memory_mb > 10 for run in found.runs)
    steps = {run.name: run.ratio for run in found.runs if run.past}
    assert found.speedup["vs_dense"] == pytest.approx(steps["dense-fp32"])
    recorded = open_build(build.path).measured.speed
    assert recorded["runs"] == [run.model_dump() for run in found.runs]


def test_of_several_prompts(build: Build) -> None:
    found = bench(build, shapes=[(1, 10), (4, 6)], seconds=0)
    assert [(run.batch, run.tokens, run.past) for run in found.runs if run.name == "compiled"] == [
        (1, 10, 0), (1, 1, 10), (4, 6, 0), (4, 1, 6),
    ]  # fmt: skip
    usual = next(run for run in found.steps if run.name == "dense-fp32" and run.past == 10)
    assert found.speedup["vs_dense"] == pytest.approx(usual.ratio)


def test_shows_first_token_pace_and_memory(build: Build) -> None:
    shown = cli(build.path)
    assert shown.exit_code == 0, shown.output
    for column in ("first token ms", "tokens/s", "memory MB"):
        assert column in shown.stdout
    assert "times as fast a step as dense-fp32" in shown.stdout
    told = json.loads(cli(build.path, "--json").stdout)
    assert {run["past"] for run in told["runs"]} == {0, 10} and all(run["memory_mb"] > 10 for run in told["runs"])


def test_llama_cpp_by_the_interpreter_given(build: Build, tmp_path: Path) -> None:
    """It is started with the file, the threads and the prompt, and takes its turns."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    body = (
        f'[ "$1" = -c ] && exit 0\necho "$2" > {tmp_path}/given\necho a line of its own\n'
        'echo \'{"version": "a stand-in"}\'\nwhile read line; do echo a line of its own; echo done; done'
    )
    python = interpreter(tmp_path / "python", body)
    found = bench(build, peers=[LLAMA], gguf=file, llama_python=python, seconds=0)
    assert [run.name for run in found.runs if run.past] == [*NAMES, LLAMA]
    assert found.speedup["vs_llama.cpp"] is not None
    given = json.loads((tmp_path / "given").read_text())
    assert given == {"path": str(file), "threads": 1, "context": 10, "vocabulary": 131}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exit 1", "does not import llama_cpp"),
        (
            '[ "$1" = -c ] && exit 0\necho no such model >&2; exit 1',
            r"failed \(exit code 1\) before the first step: no such model",
        ),
        (
            '[ "$1" = -c ] && exit 0\necho "{}"; read line; kill -SEGV $$',
            r"crashed \(SIGSEGV\) in the middle of a step",
        ),
        (
            '[ "$1" = -c ] && exit 0\necho "{}"; read line; echo lost >&2; exit 1',
            r"failed \(exit code 1\) in the middle of a step: lost",
        ),
    ],
)
def test_an_interpreter_that_does_not_do_it(body: str, says: str, build: Build, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    python = interpreter(tmp_path / "python", body)
    with pytest.raises(TargetError, match=says):
        bench(build, peers=[LLAMA], gguf=tmp_path / "model.gguf", llama_python=python, seconds=0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--peer", "llama"], "did you mean 'llama.cpp'"),
        (["--peer", LLAMA], "starts from a GGUF file"),
        (["--peer", LLAMA, "--gguf", "README.md"], "is no GGUF file"),
        (["--peer", "openvino-fp32"], "does not time a decoder's steps"),
        (["--peer", GENAI, "--shapes", "2x4"], "one text at a time"),
        (["--shapes", "1x64"], "ask for at most 63"),
        (["--peer", LLAMA, "--gguf", "no/such.gguf"], "no/such.gguf: no such file"),
        (["--peer", LLAMA, "--gguf", "m.gguf", "--llama-python", "no/python"], "there is no file no/python"),
        (["--gguf", "m.gguf"], "are options of the peer llama.cpp"),
    ],
)
def test_what_cannot_be_timed_is_refused_at_once(
    words: list[str], says: str, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("no model")
    Path("m.gguf").write_bytes(b"GGUF")
    refused = cli(build.path, *words)
    assert refused.exit_code == 1
    assert says in " ".join(refused.stderr.split()) and "Traceback" not in refused.output


def test_peers_of_decoders_do_not_time_encoders(tmp_path: Path) -> None:
    recipe = {"passes": [], "workload": {"batch": 1, "tokens": [1, 4, 8]}, "threads": 1}
    encoder = compile_model(zoo.exported("bert"), recipe, tmp_path / "bert")
    with pytest.raises(TargetError, match="times the steps of decoders"):
        bench(encoder, peers=[LLAMA], seconds=0)


def test_near_the_end_of_the_positions_and_in_a_folder_called_like_a_file(build: Build, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(build.path, tmp_path / "model.onnx"))
    found = bench(open_build(moved), shapes=[(1, 63)], seconds=0)
    assert {run.past for run in found.steps} == {63}


def test_a_process_that_hangs_is_given_up(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_PATIENCE_S", 1.0)
    python = interpreter(tmp_path / "python", "exec sleep 100")
    with Children() as waiting, pytest.raises(TargetError, match=r"gave no answer in 1 s before the first step"):
        waiting.start("peer", python, "llama_steps.py")


def test_its_neighbours_are_found_wherever_python_looks(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    assert bench(build, seconds=0).steps


def test_shards_share_the_threads_and_count_their_memory_together(tmp_path: Path) -> None:
    zoo.save_pretrained("llama", tmp_path / "llama")
    one = {"passes": [], "workload": WORKLOAD, "threads": 1}
    whole = bench(compile_model(tmp_path / "llama", one, tmp_path / "whole"), seconds=0)
    divided = bench(compile_model(tmp_path / "llama", one, tmp_path / "divided", shards=2), seconds=0)
    assert divided.machine.threads == 2
    assert divided.steps[0].memory_mb > 1.5 * whole.steps[0].memory_mb  # two processes, each with its runtime


def test_a_process_that_does_not_start() -> None:
    with Children() as children, pytest.raises(TargetError, match="cannot be run"):
        children.start("peer", "/no/such/python", "llama_steps.py")


@pytest.mark.slow
def test_genai_builds_and_runs_the_same_checkpoint(build: Build) -> None:
    pytest.importorskip("onnxruntime_genai")
    found = bench(build, peers=[GENAI], seconds=0)
    assert [run.name for run in found.runs if run.past] == [*NAMES, GENAI]
