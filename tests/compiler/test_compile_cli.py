"""`trimtab compile`: what it prints, and that any fault is one message and an exit code, with nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import zoo
from typer.testing import CliRunner, Result

from trimtab import passes
from trimtab.compiler.builds.build import open_build
from trimtab.compiler.builds.manifest import LeftPlace, PassReport
from trimtab.compiler.cli.app import app
from trimtab.compiler.cli.compile import _left, _losses

PLAIN = "passes: [canonicalize]\nthreads: 1\n"
DAMPEN = "passes: [dampen]\ncalibration: {samples: 16, states: 64}\nthreads: 1\n"


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(passes._PASSES, "dampen", tiny.PASS)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny.model(tmp_path / "model.onnx")
    tiny.data(tmp_path / "data.npz")
    Path("plain.yaml").write_text(PLAIN)
    Path("dampen.yaml").write_text(DAMPEN)


def trimtab(*args: str) -> Result:
    return CliRunner().invoke(app, ["compile", *args])


def leftovers() -> list[str]:
    """What lies in the working directory beside what was there at first."""
    return sorted(
        {path.name for path in Path().iterdir()} - {"cache", "model.onnx", "data.npz", "plain.yaml", "dampen.yaml"}
    )


def test_it_shows_what_was_done_and_what_comes_next() -> None:
    found = trimtab("model.onnx", "dampen.yaml", "-o", "build", "--data", "data.npz", "--set", "dampen.factor=0.5")
    assert found.exit_code == 0, found.output
    for part in ("all weights", "FFN weights", "dampen: 1 changed, 1 left", "left layer 9 FFN", "trimtab bench build"):
        assert part in found.stdout
    assert open_build("build").manifest.recipe["passes"] == [{"dampen": {"factor": 0.5, "spare": None, "budget": None}}]
    assert "calibrate: 16/16" in found.stderr
    assert "\x1b" not in found.output
    assert leftovers() == ["build"]
    again = trimtab("model.onnx", "dampen.yaml", "-o", "build", "--data", "data.npz", "--set", "dampen.factor=0.5")
    assert "up to date" in again.stdout
    assert "build: built for onnxruntime in" in found.stdout and "built for" not in again.stdout


def test_a_decoder_s_cache_is_one_line() -> None:
    """And not one for keys and values of each layer."""
    done = trimtab(str(zoo.exported("llama", "cached")), "plain.yaml", "-o", "decoder")
    lines = [line for line in done.output.splitlines() if "differs from dense" in line]
    assert [line.split(":")[0] for line in lines[:1]] == ["logits"] and len(lines) == 2
    assert lines[1].startswith("present.") and "the worst of 4 of the cache" in lines[1]
    shown = CliRunner().invoke(app, ["validate", "decoder"]).output
    assert shown.count("present.") == shown.count("the worst of 4 of the cache") > 0


def test_json_is_nothing_but_json() -> None:
    found = trimtab("model.onnx", "plain.yaml", "-o", "build", "--json")
    assert json.loads(found.stdout)["key"] == open_build("build").manifest.key


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["model.onnx", "dampen.yaml", "-o", "build"], "--data FILE"),
        (["none.onnx", "plain.yaml", "-o", "build"], "none.onnx: no such file"),
        (["none.onnx", "dampen.yaml", "-o", "build"], "none.onnx: no such file"),  # before it asks for data
        (["model.onnx", ".", "-o", "build"], ".: is a directory, not a recipe"),
        (["data.npz", "plain.yaml", "-o", "build"], "data.npz: not an ONNX file"),
        (["model.onnx", "none.yaml", "-o", "build"], "none.yaml: no such recipe"),
        (["model.onnx", "plain.yaml", "-o", "model.onnx/build"], "cannot write the build"),
        (["model.onnx", "plain.yaml", "-o", "/proc/build"], "cannot write the build"),
        (["model.onnx", "plain.yaml", "-o", "plain.yaml"], "plain.yaml: exists and is not a directory"),
        (["model.onnx", "plain.yaml", "-o", "build", "--target", "onnx-runtime"], "did you mean 'onnxruntime'"),
        (["model.onnx", "plain.yaml", "-o", "build", "--set", "treads=2"], "did you mean 'threads'"),
        (["model.onnx", "dampen.yaml", "-o", "build", "--data", "none.txt"], "none.txt: no such file"),
        (["model.onnx", "dampen.yaml", "-o", "build", "--profile", "none"], "none: no such profile"),
        (["model.onnx", "dampen.yaml", "-o", "build", "--profile", "data.npz"], "not a profile"),
    ],
)
def test_bad_input_is_one_message(args: list[str], said: str) -> None:
    found = trimtab(*args)
    assert found.exit_code == 1
    assert found.stderr.count("error:") == 1
    assert said in found.stderr
    assert "Traceback" not in found.output
    assert found.stdout == ""
    assert leftovers() == []


def process(*args: str, before: str = "", **options: Any) -> subprocess.Popen[str]:
    """`trimtab compile` in a process of its own, with the pass for tests, after the code `before`."""
    script = textwrap.dedent(f"""
        import sys, time
        import tiny
        from trimtab import passes
        passes._PASSES["dampen"] = tiny.PASS
        {before}
        from trimtab.compiler.cli import main
        main()
    """)
    env = os.environ | {"PYTHONPATH": str(Path(tiny.__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, "compile", *args]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


NAPS = "[time.sleep(0.05) for _ in range(1200)]"  # CPython sleeps on after a signal that comes just before the call


def test_places_left_for_one_reason_are_counted() -> None:
    """A line for each of 30 layers says no more than one."""
    few = [LeftPlace(where=f"layer {i}", why="it is small") for i in range(3)]
    many = [LeftPlace(where=f"layer {i}", why="it is new") for i in range(30)]
    assert list(_left([many[0], *few, *many[1:]])) == [
        "layer 0 and 29 more: it is new", "layer 0: it is small", "layer 1: it is small", "layer 2: it is small",
    ]  # fmt: skip
    assert list(_left([])) == []


def test_a_loss_that_a_pass_measured_is_told() -> None:
    """0.21 nats, as a head of too few candidates once had, are 23 % of perplexity."""
    reports = [
        PassReport(name=name, changed=1, details=details)
        for name, details in (
            ("head-topk", {"divergence": 0.21}), ("mild", {"divergence": 0.009, "error": 0.009}),
            ("ffn-topk", {"error": 0.178}), ("other", {}),
        )
    ]  # fmt: skip
    head, ffn = _losses(reports)
    assert head.startswith("head-topk: 0.210 nats a token") and "23% of perplexity" in head
    assert ffn.startswith("ffn-topk: ") and "squared error of 0.178" in ffn


STALL = f"tiny.Dampen.run = lambda *_: print('stalled', flush=True) or {NAPS}"
SLOW = ("model.onnx", "dampen.yaml", "-o", "deep/build", "--data", "data.npz")


def stalled() -> subprocess.Popen[str]:
    """A compile that stands still in the middle of its passes."""
    running = process(*SLOW, before=STALL)
    assert running.stdout is not None
    assert running.stdout.readline() == "stalled\n"
    return running


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_what_ends_it_leaves_nothing(number: int, code: int, says: str) -> None:
    running = stalled()
    assert leftovers() == ["deep"]
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert running.returncode == code
    assert said.splitlines()[-1] == says
    assert "Traceback" not in said
    assert leftovers() == []


def test_a_second_compile_into_the_same_directory_is_refused_at_once() -> None:
    running = stalled()
    found = trimtab(*SLOW)
    assert found.exit_code == 1
    assert "another process is writing this build" in found.stderr
    running.kill()
    running.communicate()
    assert trimtab(*SLOW).exit_code == 0  # a killed one stands in nobody's way
    assert [path.name for path in Path("deep").iterdir()] == ["build"]


@pytest.mark.parametrize("limit", [100, 6000])
def test_a_full_disk(limit: int) -> None:
    """No file may grow beyond `limit` bytes: the graph, or only the weights, do not fit."""
    bound: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    running = process("model.onnx", "plain.yaml", "-o", "build", preexec_fn=bound)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1, said
    assert "cannot write the build" in said
    assert "Traceback" not in said
    assert leftovers() == []
