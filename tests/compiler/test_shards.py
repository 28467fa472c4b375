"""Builds in shards: the single-device result from several processes, which come and go with the one that asks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zoo
from clear import clear_prompts
from seeds import seeded
from switched import variant
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.checks.bench import bench
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.cli.app import app
from trimtab.compiler.engine import Engine
from trimtab.compiler.generation import generate
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.workload import _dimension
from trimtab.passes.errors import BuildError, ModelError, RecipeError, TargetError

WORKLOAD = {"batch": [1, 2, 4], "tokens": [1, 8, 24]}
DENSE = {"passes": [], "workload": WORKLOAD, "threads": 1}
SPARSE = {
    "passes": [
        {"ffn-topk": {"density": 0.2, "recall": 0.8, "rank": 16, "most": 1.0, "dense_above": 8}},
        {"head-topk": {"take": 24, "rank": 12, "most": 1.0, "dense_above": 8}},
        {"weight-only": {"parts": ["attention"]}},
    ],
    "workload": WORKLOAD, "threads": 1, "calibration": {"states": 600},
}  # fmt: skip


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def text_data(path: Path) -> Path:
    rng = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(4, 130, 20)) for _ in range(60)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: a LLaMA whose vocabulary and neurons divide by 2, and a BERT."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("shards")
    config = zoo.tiny_model("llama").config.to_dict() | {"vocab_size": 132}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "llama")
    zoo._tokenizer(132).save_pretrained(folder / "llama")
    zoo.save_pretrained("bert", folder / "bert")
    return folder


def compiled(folder: Path, model: str, recipe: dict[str, Any], shards: int) -> Build:
    name = f"{model}-{'sparse' if recipe is SPARSE else 'dense'}-{shards}"
    data = text_data(folder / "data.txt") if recipe is SPARSE else None
    return compile_model(folder / model, recipe, folder / name, data=data, shards=shards)


@pytest.fixture(scope="module")
def dense(folder: Path) -> Any:
    """A LLaMA in two shards, loaded."""
    engine = load(compiled(folder, "llama", DENSE, 2).path)
    yield engine
    engine.close()


def workers(engine: Engine) -> list[psutil.Process]:
    crew = engine.runner._crew  # type: ignore[attr-defined]
    return [psutil.Process(worker.pid) for worker in crew._workers.values()]


def tokens(engine: Engine, prompts: list[list[int]], count: int = 12) -> np.ndarray:
    return np.stack(list(generate(engine.runner, prompts, max_new_tokens=count)), 1)


def prompts(engine: Engine, rng: np.random.Generator) -> list[list[int]]:
    return clear_prompts(engine.runner, (7, 1, 4), 12, (3, 132), rng)


def full_feeds(engine: Engine, batch: int, count: int, past: int = 0) -> dict[str, np.ndarray]:
    """Every input of a decoder, its cache too."""
    rng = seeded()
    sizes = {"batch": batch, "tokens": count, "past": past, "total": past + count}
    found = {}
    for tensor in engine.inputs:
        shape = [
            size if isinstance(size, int) else sizes[_dimension(str(size)) or str(size)] for size in tensor.shape or ()
        ]
        if tensor.dtype == "int64":
            found[tensor.name] = rng.integers(3, 132, shape) if tensor.name == "input_ids" else np.ones(shape, np.int64)
        else:
            found[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def close(ours: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance * max(np.abs(value).max(), 1e-6))


def test_dense_equals_one_device(folder: Path, dense: Engine) -> None:
    one = load(compiled(folder, "llama", DENSE, 1).path)
    for batch, count, past in ((1, 1, 0), (2, 9, 0), (1, 2, 5), (3, 1, 4)):
        feeds = full_feeds(one, batch, count, past)
        close(dense.run(feeds), one.run(feeds))
    asked = prompts(one, seeded())
    np.testing.assert_array_equal(tokens(dense, asked), tokens(one, asked))


def test_generations_take_turns(dense: Engine, folder: Path) -> None:
    """Each has a cache of its own in every process."""
    rng = seeded()
    one = load(compiled(folder, "llama", DENSE, 1).path)
    first, second = prompts(one, rng), prompts(one, rng)[:2]
    streams = [generate(dense.runner, asked, max_new_tokens=8) for asked in (first, second)]
    pairs = list(zip(*streams, strict=True))
    for number, asked in enumerate((first, second)):
        np.testing.assert_array_equal(np.stack([pair[number] for pair in pairs], 1), tokens(one, asked, 8))


def test_calls_of_many_threads(dense: Engine) -> None:
    """Every rank does them in the same order, and caches that nobody wants any more are dropped on the way."""
    rng = seeded()
    asked = [rng.integers(3, 132, (1, rng.integers(1, 9))).tolist() for _ in range(12)]
    feeds = [full_feeds(dense, 1, int(count)) for count in rng.integers(1, 9, 12)]
    wanted = [tokens(dense, prompt, 4) for prompt in asked], [dense.run(given) for given in feeds]
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(tokens, dense, prompt, 4) for prompt in asked]
        runs = [pool.submit(dense.run, given) for given in feeds]
        for stream, want in zip(streams, wanted[0], strict=True):
            np.testing.assert_array_equal(stream.result(), want)
        for run, each in zip(runs, wanted[1], strict=True):
            close(run.result(), each)


def test_sparse_equals_its_own_graph_on_one_device(folder: Path) -> None:
    """Compiled for two shards, run by one process: the same choices, so the same result."""
    two = compiled(folder, "llama", SPARSE, 2)
    reports = {report.name: report for report in two.manifest.passes}
    assert reports["shard"].changed == 3 and not reports["shard"].left
    assert all(row["shards"] == 2 and row["recall"] >= 0.8 for row in reports["ffn-topk"].details["layers"])
    assert reports["head-topk"].details["shards"] == 2
    runs = whole_graph(folder, two)
    engine = load(two.path)
    for batch, count in ((1, 1), (4, 1), (1, 24)):  # few tokens, whose neurons are chosen, and a dense prompt
        errors = []
        for _ in range(9):  # in one prompt of forty, rounding moves an activation to another of the 8-bit numbers
            feeds = full_feeds(engine, batch, count)
            ours, wanted = engine.run(feeds), runs(feeds)
            close(ours, wanted, 0.03)
            errors.append(max(np.abs(ours[name] - wanted[name]).max() / np.abs(wanted[name]).max() for name in wanted))
        assert np.median(errors) < 1e-4
    engine.close()


def whole_graph(folder: Path, build: Build) -> Any:
    """The graph that was divided, as one."""
    from trimtab.compiler.sources import open_source
    from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
    from trimtab.passes import PassContext, run_passes
    from trimtab.passes.contract import Capability
    from trimtab.passes.graph import save_graph
    from trimtab.passes.profile import Profile

    graph = open_source(folder / "llama").graph()
    profile = Profile.load(build.path / "profile.safetensors")
    bits = Capability(
        **build.manifest.capability | {"weight_bits": frozenset(build.manifest.capability["weight_bits"])}
    )
    run_passes(graph, load_recipe(SPARSE).passes, PassContext(profile, bits, shards=2))
    save_graph(graph, folder / "whole.onnx")
    return OnnxRuntimeRunner(folder / "whole.onnx").run


def test_bert_in_four(folder: Path) -> None:
    one, four = (load(compiled(folder, "bert", DENSE, shards).path) for shards in (1, 4))
    rng = seeded()
    for batch, count in ((1, 1), (3, 17)):
        feeds = zoo.feeds("bert", batch, count, rng)
        close(four.run(feeds), one.run(feeds))
    assert len(workers(four)) == 3
    four.close()


def test_the_build_says_what_it_is(folder: Path) -> None:
    build = compiled(folder, "llama", DENSE, 2)
    assert build.manifest.shards == build.manifest.recipe["shards"] == 2
    assert build.manifest.check.ran and build.manifest.check.outputs[0].relative_l2 < 1e-5  # type: ignore[operator]
    names = set(build.manifest.files)
    assert {
        "model/shards.json",
        "model/weights.data",
        "model/rank0.segment0.onnx",
        "model/rank1.segment2.onnx",
    } <= names
    assert "model/model.onnx" not in names
    assert "| layer 1 FFN | neurons | 108 | 54 |" in (build.path / "report.md").read_text()
    one = compiled(folder, "llama", DENSE, 1)
    total = build.manifest.files["model/weights.data"].bytes
    assert total < 1.3 * one.manifest.files["model/model.onnx.data"].bytes  # what ranks share lies there once
    assert compile_model(folder / "llama", DENSE, build.path, shards=2).reused
    damaged = build.path / "model" / "rank1.segment1.onnx"
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-1] + b"x")
    try:
        with pytest.raises(BuildError, match=r"rank1\.segment1\.onnx"):
            open_build(build.path)
    finally:
        damaged.write_bytes(kept)


def test_validate_and_bench(folder: Path) -> None:
    build = compiled(folder, "llama", SPARSE, 2)
    found = validate(build, data=text_data(folder / "held.txt"), samples=4, threads=1)
    assert not found.failures and found.passed is None and found.quality is not None
    single = compiled(folder, "llama", DENSE, 2)
    exact = validate(single, threads=1)
    assert not exact.failures and max(each.relative_l2 or 0 for each in exact.outputs) < 1e-5
    timed = bench(single, shapes=[(1, 4)], seconds=0.5)
    assert {run.name for run in timed.runs} >= {"compiled", "dense-fp32"}
    assert timed.machine.threads == 2  # one of each rank


def test_commands(folder: Path) -> None:
    out = folder / "by-command"
    made = cli("compile", folder / "llama", "-o", out, "--shards", 2, "--set", "passes=[]", "--set", "workload.batch=1")
    assert made.exit_code == 0, made.stderr
    assert "shard: 3 changed" in made.stdout
    said = cli("generate", out, "--prompt", "w5 w6", "--max-new-tokens", 5, "--json")
    one = cli(
        "generate", compiled(folder, "llama", DENSE, 1).path, "--prompt", "w5 w6", "--max-new-tokens", 5, "--json"
    )
    assert json.loads(said.stdout)["answers"] == json.loads(one.stdout)["answers"]
    packed = cli("package", out, "--genai", folder / "genai")
    assert packed.exit_code == 1 and "divided into 2 shards" in packed.stderr and "without --shards" in packed.stderr


@pytest.mark.parametrize("shards", [0, -1])
def test_impossible_numbers(shards: int, folder: Path) -> None:
    with pytest.raises(RecipeError, match="shards"):
        compile_model(folder / "bert", DENSE, folder / "never", shards=shards)
    found = cli("compile", folder / "bert", "-o", folder / "never", "--shards", shards)
    assert found.exit_code == 1 and "shards" in found.stderr and "Traceback" not in found.stderr
    assert not (folder / "never").exists()


def test_other_targets_refuse_before_the_work(folder: Path) -> None:
    with pytest.raises(TargetError, match="target tensorrt-rtx does not run a model in 2 shards"):
        compile_model(folder / "nowhere", DENSE, folder / "never", target="tensorrt-rtx", shards=2)


def test_torch_is_needed_and_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with pytest.raises(TargetError, match=r"trimtab\[shards\]"):
        compile_model(folder / "nowhere", DENSE, folder / "never", shards=2)
    with pytest.raises(TargetError, match=r"trimtab\[shards\]"):
        load(compiled_before(folder))


def compiled_before(folder: Path) -> Path:
    return folder / "llama-dense-2" if (folder / "llama-dense-2").exists() else pytest.skip("runs with the others")


def test_genai_is_refused(dense: Engine, folder: Path) -> None:
    from trimtab.compiler.packaging.genai import package_genai

    with pytest.raises(ModelError, match="divided into 2 shards"):
        package_genai(open_build(folder / "llama-dense-2"), folder / "genai")


def test_a_killed_process_is_named_and_started_again(dense: Engine) -> None:
    feeds = full_feeds(dense, 1, 3)
    wanted = dense.run(feeds)
    steps = dense.runner.steps(1, 8)
    (worker,) = workers(dense)
    worker.kill()
    with pytest.raises(TargetError, match="rank 1 was ended by SIGKILL"):
        dense.run(feeds)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    close(dense.run(feeds), wanted)
    with pytest.raises(TargetError, match="their caches are lost"):
        steps.run(np.array([[5]]), np.array([[1]]))


def test_a_process_that_hangs_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_SHARD_TIMEOUT", "6")
    engine = load(compiled(folder, "llama", DENSE, 2).path)
    feeds = full_feeds(engine, 1, 3)
    engine.run(feeds)
    (stopped,) = workers(engine)
    stopped.suspend()
    start = time.monotonic()
    with pytest.raises(TargetError, match="the ranks lost each other"):
        engine.run(feeds)
    assert time.monotonic() - start < 60
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    engine.close()


def test_a_model_that_does_not_run_is_the_models_fault(dense: Engine) -> None:
    feeds = full_feeds(dense, 1, 3)
    with pytest.raises(TargetError, match=r"could not run rank0\.segment0"):
        dense.runner.run(feeds | {"input_ids": np.full((1, 3), 10**6)})  # which the engine would refuse before
    dense.run(feeds)


SCRIPT = """
import sys, time
import numpy as np
from trimtab.compiler import load
if __name__ == "__main__":
    engine = load(sys.argv[1])
    print(*[w.pid for w in engine.runner._crew._workers.values()], flush=True)
    while sys.argv[2] == "wait":
        time.sleep(0.05)  # in short naps: CPython sleeps on after a signal that comes just before the system call
    if sys.argv[2] == "raise":
        raise ValueError
"""


@pytest.mark.parametrize("how", ["end", "raise", "interrupt", "kill"])
def test_the_processes_end_with_the_one_that_started_them(how: str, dense: Engine, folder: Path) -> None:
    waits = how in ("interrupt", "kill")
    command = [sys.executable, "-c", SCRIPT, str(folder / "llama-dense-2"), "wait" if waits else how]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 1
    if waits:
        os.killpg(parent.pid, signal.SIGINT) if how == "interrupt" else parent.kill()
    parent.wait(60)
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=30)
    assert not alive


LAUNCHED = """
import os
import sys
import numpy as np
from trimtab.compiler import load
from trimtab.compiler.generation import generate
if __name__ == "__main__":
    engine = load(sys.argv[1:][int(os.environ["RANK"]) % len(sys.argv[1:])])
    found = np.stack(list(generate(engine.runner, [[5, 6, 7], [8]], max_new_tokens=6)), 1)
    print(found.tolist(), flush=True)
"""


OWN_GROUP = "import torch.distributed\ntorch.distributed.init_process_group('gloo')\n"


def launch(world: int, script: Path, *builds: Path, first: str = "") -> list[tuple[int, str, str]]:
    """What each of `world` ranks printed, started as torchrun would; of several `builds`, each rank loads its own.

    Args:
        first: code that runs before the rest of the script.
    """
    import socket

    script.write_text(first + LAUNCHED)
    with socket.socket() as held:  # until the end, so that no other process is given the port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), *map(str, builds)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(held.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo",
                },
            )
            for rank in range(world)
        ]  # fmt: skip
        return [(rank.wait(120), *rank.communicate()) for rank in ranks]


@pytest.mark.parametrize("first", ["", OWN_GROUP], ids=["no group", "a group of the script's"])
def test_a_launcher_starts_the_ranks(dense: Engine, folder: Path, tmp_path: Path, first: str) -> None:
    wanted = tokens(dense, [[5, 6, 7], [8]], 6).tolist()
    for code, out, err in launch(2, tmp_path / "script.py", folder / "llama-dense-2", first=first):
        assert code == 0, err
        assert json.loads(out) == wanted


def test_a_launcher_of_too_few_ranks_is_refused(dense: Engine, folder: Path, tmp_path: Path) -> None:
    ((code, _, err),) = launch(1, tmp_path / "script.py", folder / "llama-dense-2")
    assert code == 1 and "the build has 2 shards, and WORLD_SIZE is 1" in err


def test_ranks_of_different_builds_are_refused(dense: Engine, folder: Path, tmp_path: Path) -> None:
    """As when a compile replaces the build between the loads of two ranks."""
    other = variant(open_build(folder / "llama-dense-2"), tmp_path / "other")
    for code, _, err in launch(2, tmp_path / "script.py", folder / "llama-dense-2", other.path):
        assert code == 1 and "the ranks have loaded different builds" in err
