"""`trimtab serve`: one command to an answer, a graceful stop, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import triton_server
from sealed import entry, listed, seal
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import Build
from trimtab.compiler.cli.app import app
from trimtab.compiler.serving import environment, process
from trimtab.compiler.serving.example import ask
from trimtab.compiler.serving.find import VARIABLE, TritonServer
from trimtab.compiler.serving.stubs import Stub, find_stubs
from trimtab.compiler.targets.tensorrt.info import EngineInfo
from trimtab.passes.errors import TargetError

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
FREE = ("--port", 0, "--grpc-port", 0, "--metrics-port", 0)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("serve")
    source = triton_server.exported("distilbert", folder / "model")
    return compile_model(source, {"passes": [], "threads": 1}, folder / "tiny build")


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def stub(path: Path, body: str) -> Path:
    """A program in the place of tritonserver, with a Python backend beside it."""
    binary = path / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text(f"#!/bin/sh\n{body}\n")
    binary.chmod(0o755)
    (path / "backends" / "python").mkdir(parents=True)
    return binary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "crash"), [(signal.SIGTERM, False), (signal.SIGINT, True)], ids=["SIGTERM", "Ctrl-C behind a crash"]
)
def test_from_a_build_to_an_answer_and_back(build: Build, tmp_path: Path, number: int, crash: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        triton_server.server(patch)
        command = [sys.executable, "-m", "trimtab.compiler.cli", "serve", build.path, "--json", *FREE]
        command += ["--repository", tmp_path / "repository", "--log", tmp_path / "log"]
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or lines[-1].rstrip() != "}":
            lines.append(process.stdout.readline())
            assert lines[-1], "ended without an answer"
        told = json.loads("".join(lines))
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("tritonserver" in child.name() for child in children) and len(children) >= 3
        assert told["models"] == ["tiny_build", "tiny_build_engine"]
        words = shlex.split(told["curl"])
        answer = json.loads(ask(words[2], words[4]))
        states = load(build.path).run(load(build.path).tokenize(["It works."]))["last_hidden_state"]
        np.testing.assert_allclose(answer["EMBEDDING"], states[0].mean(0), rtol=1e-4, atol=1e-5)
        assert 'nv_inference_request_success{model="tiny_build"' in ask(told["metrics"])
        if crash:
            next(child for child in children if "stub" in child.name()).kill()
            assert answer == asked_until_it_answers(words[2], words[4])
            children = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    for url in (told["http"], told["metrics"].removesuffix("/metrics"), f"http://{told['grpc']}"):
        with socket.socket() as held:  # the port is free again
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", int(url.rpartition(":")[2])))
    assert not list(Path("/dev/shm").glob(f"trimtab_{process.pid}_*"))
    assert (tmp_path / "repository" / "tiny_build" / "config.pbtxt").is_file() and (tmp_path / "log").stat().st_size


def asked_until_it_answers(url: str, body: str) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return json.loads(ask(url, body))
        except TargetError:  # noqa: PERF203
            assert time.monotonic() < deadline
            time.sleep(0.2)


SERVER = """#!{python}
import subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
stub = Path(__file__).with_name("triton_python_backend_stub")
print("starting", flush=True)
subprocess.Popen([stub, options["model-repository"] + "/reranker/1/model.py"])

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(options["http-port"])), Answer).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TritonServer:
    """A server that answers whether it is ready, and has the process of one model."""
    monkeypatch.setattr(process, "_WATCH_S", 0.02)
    for name, text in (("tritonserver", SERVER), ("triton_python_backend_stub", "#!/bin/sh\nread line\nsleep 600\n")):
        (tmp_path / name).write_text(text.replace("{python}", sys.executable))
        (tmp_path / name).chmod(0o755)
    return TritonServer(tmp_path / "tritonserver", tmp_path)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def only_stub(served: process.Served) -> psutil.Process:
    wait_until(lambda: find_stubs(served.process.pid))
    (stub,) = find_stubs(served.process.pid)
    assert stub.model == "reranker"
    return stub.process


def test_a_model_whose_process_ends_comes_back(
    stand_in: TritonServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, watched = process.choose_ports("127.0.0.1", process.Ports(0, 0, 0)), set[int]()

    def look(server: int) -> list[Stub]:
        stubs = find_stubs(server)
        watched.update([server] if stubs else [])
        return stubs

    monkeypatch.setattr(process, "find_stubs", look)
    with process.serve(stand_in, tmp_path, tmp_path / "log", ports=ports) as served, ThreadPoolExecutor(1) as pool:
        first, seen = served.process, []
        only_stub(served)
        waiting = pool.submit(served.wait)
        for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL, signal.SIGSEGV):
            seen.append(served.process.pid)
            wait_until(lambda: served.process.pid in watched)
            only_stub(served).send_signal(number)
            wait_until(lambda: served.process.pid != seen[-1] or waiting.done())
        with pytest.raises(TargetError, match=r"process of model reranker crashed \(SIGSEGV\), 4 times in") as caught:
            waiting.result(60)
        assert len(set(seen)) == 4 and first.poll() is not None
        assert "update it" in str(caught.value.hint) and "starting" in caught.value.message
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said[0] == "the process of model reranker was ended by SIGKILL; the server starts again"
    assert [("SIGKILL" in line, "SIGSEGV" in line) for line in said] == [(True, False), (False, True), (True, False)]
    assert served.process.poll() is not None
    assert (tmp_path / "log").read_text().count("starting") == 4


def test_a_child_that_ends_while_it_is_read_hides_no_other(
    stand_in: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, listed = process.choose_ports("127.0.0.1", process.Ports(0, 0, 0)), psutil.Process.children
    with process.serve(stand_in, tmp_path, tmp_path / "log", ports=ports) as served:
        kept = only_stub(served)
        with subprocess.Popen(["sleep", "60"]) as child:
            ended = psutil.Process(child.pid)
            child.kill()
        monkeypatch.setattr(psutil.Process, "children", lambda self, **how: [ended, *listed(self, **how)])
        assert only_stub(served) == kept


def test_a_model_that_is_seen_late_is_watched(
    stand_in: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, looks = process.choose_ports("127.0.0.1", process.Ports(0, 0, 0)), []

    def late(server: int) -> list[Any]:
        looks.append(server)
        return find_stubs(server) if len(looks) > 2 else []

    monkeypatch.setattr(process, "find_stubs", late)
    monkeypatch.setattr(process, "_RESTARTS", 0)
    with process.serve(stand_in, tmp_path, tmp_path / "log", ports=ports) as served, ThreadPoolExecutor(1) as pool:
        stub, waiting = only_stub(served), pool.submit(served.wait)
        while len(looks) < 3:
            time.sleep(0.02)
        time.sleep(0.1)
        stub.kill()
        with pytest.raises(TargetError, match="process of model reranker was ended by SIGKILL"):
            waiting.result(60)


def test_a_server_that_a_signal_ends_is_named(stand_in: TritonServer, tmp_path: Path) -> None:
    ports = process.choose_ports("127.0.0.1", process.Ports(0, 0, 0))
    with process.serve(stand_in, tmp_path, tmp_path / "log", ports=ports) as served:
        served.process.kill()
        with pytest.raises(TargetError, match="tritonserver was ended by SIGKILL") as caught:
            served.wait()
    assert "memory ran out" in str(caught.value.hint)


def test_a_server_that_does_not_end_in_time_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_KILL_S", 0.1)
    assert process._LEAVE_S < 5
    started = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; sleep 600 & wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert started.stdout is not None and started.stdout.readline()  # the trap is set
    process._stop(started)
    assert started.poll() == -signal.SIGKILL


@pytest.mark.parametrize("when", ["starts", "is ready"])
def test_sigterm_ends_it_and_leaves_nothing(
    when: str, build: Build, stand_in: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "server" / "backends" / "python").mkdir(parents=True)
    (tmp_path / "server" / "bin").mkdir()
    for name in ("tritonserver", "triton_python_backend_stub"):
        (tmp_path / name).rename(tmp_path / "server" / "bin" / name)
    server = tmp_path / "server" / "bin" / "tritonserver"
    answer = "self.send_response(200)" if when == "is ready" else "self.send_response(503)"
    body = "    do_POST = do_GET\n\nHTTPServer"
    server.write_text(
        server.read_text().replace("self.send_response(200)", answer).replace("HTTPServer((", f"{body}((", 1)
    )
    env = os.environ | {VARIABLE: str(server), "TMPDIR": str(tmp_path / "temporary")}
    command = [sys.executable, "-m", "trimtab.compiler.cli", "serve", str(build.path), *map(str, FREE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as running:
        if when == "is ready":
            assert running.stdout is not None
            while "Ctrl-C stops it" not in running.stdout.readline():
                assert running.poll() is None
        else:
            while not psutil.Process(running.pid).children():
                assert running.poll() is None
                time.sleep(0.02)
        children = psutil.Process(running.pid).children(recursive=True)
        running.terminate()
        said = running.communicate(timeout=60)[1]
    assert running.returncode == (0 if when == "is ready" else 143)
    assert said.splitlines()[-1] == ("stopped" if when == "is ready" else "terminated") and "Traceback" not in said
    assert children and not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE]
    assert not list((tmp_path / "temporary").glob("trimtab*"))


def test_a_port_that_is_taken(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(stub(tmp_path, "exit 0")))
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        done = cli("serve", build.path, *FREE[:2], "--grpc-port", held.getsockname()[1], *FREE[4:])
    assert done.exit_code == 1 and "--grpc-port" in done.stderr and "in use" in done.stderr
    assert "give another --grpc-port" in done.stderr


@pytest.mark.parametrize(
    ("body", "timeout", "says"),
    [
        (
            "echo 'I0101 loading'; echo 'E0101 failed to load the thing'; exit 3",
            60,
            ["exit code 3", "failed to load the thing"],
        ),
        ("echo 'Segmentation fault imminent'; kill -SEGV $$", 60, ["SIGSEGV", "fault imminent"]),
        ("echo 'still loading'; exec sleep 60", 3, ["not ready in 3 s", "still loading", "--start-timeout"]),
    ],
    ids=["fails", "crashes", "hangs"],
)
def test_a_server_that_does_not_start(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, timeout: int, says: list[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(stub(tmp_path, body)))
    done = cli("serve", build.path, *FREE, "--start-timeout", timeout)
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    for said in says:
        assert said in done.stderr
    assert not [child for child in psutil.Process().children(recursive=True) if "sleep" in child.name()]


def test_a_port_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    with socket.socket() as silent, subprocess.Popen(["sleep", "60"]) as sleeping:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (tmp_path / "log").touch()
        start = time.monotonic()
        with pytest.raises(TargetError, match=r"not ready in 0\.2 s"):
            process._await(sleeping, f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2, tmp_path / "log")
        sleeping.kill()
    assert time.monotonic() - start < 30  # far from the minutes that an answer may take


def test_an_answer_that_is_no_http() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()

        def answer() -> None:
            with held.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"no such protocol\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TargetError, match="no answer"):
            ask(f"http://127.0.0.1:{held.getsockname()[1]}")
        thread.join()


def test_a_second_ctrl_c_still_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    started = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; sleep 60 & wait"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert started.stdout is not None and started.stdout.readline()  # the trap is set
    wait = started.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(started, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process._stop(started)
    assert started.poll() == -signal.SIGKILL


def test_ipv6_is_written_in_brackets(tmp_path: Path) -> None:
    served = process.Served("::1", process.Ports(), subprocess.Popen(["true"]), tmp_path / "log")
    served.process.wait()
    assert served.url == "http://[::1]:8000"


def test_onnxruntime_for_gpus_names_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(environment, "version", version)
    assert "onnxruntime==1.2.3" in environment.requirements()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max-batch", "99"], "batches of 99"),
        (["--name", "..."], "is not a valid name for a Triton model"),
        (["--repository", "."], "exists already"),
        (["--log", "/nowhere/log"], "cannot be written"),
    ],
)
def test_bad_input_is_told_before_a_server_is_looked_for(
    build: Build, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    monkeypatch.setattr("trimtab.compiler.serving.build.find_server", lambda progress: pytest.fail("looked for"))
    done = cli("serve", build.path, *words, *FREE)
    assert done.exit_code == 1 and says in done.stderr and "hint:" in done.stderr


@pytest.mark.parametrize(
    ("words", "env", "says"),
    [
        (["/nowhere"], {}, "no such build"),
        ([], {VARIABLE: "/nowhere/tritonserver"}, "is no program"),
        (["--backend", "tensorrt"], {}, "was built for onnxruntime"),
        (["--max-batch", "99"], {}, "batches of 99"),
    ],
)
def test_bad_input(
    build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], env: dict[str, str], says: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(stub(tmp_path, "exit 0")))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    where = [] if words[:1] == ["/nowhere"] else [build.path]
    done = cli("serve", *where, *words, *FREE)
    assert done.exit_code == 1 and says in done.stderr and "hint:" in done.stderr


def test_a_server_without_the_backend(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = stub(tmp_path, "exit 0")
    monkeypatch.setenv(VARIABLE, str(binary))
    done = cli("serve", build.path, "--backend", "onnxruntime", *FREE)
    assert done.exit_code == 1 and "has no onnxruntime backend" in done.stderr
    (tmp_path / "backends" / "python").rmdir()
    done = cli("serve", build.path, *FREE)
    assert done.exit_code == 1 and "has no Python backend" in done.stderr


def test_an_engine_for_a_gpu_without_one(build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("trimtab.compiler.serving.build.gpu_present", lambda: False)
    copy = tmp_path / "build"
    copy.mkdir()
    for path in build.path.rglob("*"):
        target = copy / path.relative_to(build.path)
        target.mkdir() if path.is_dir() else target.write_bytes(path.read_bytes())
    info = EngineInfo(target="tensorrt", library="tensorrt", version="10.9", precisions=(), engines=())
    (copy / "engine").mkdir(exist_ok=True)
    info.write(copy / "engine")
    for target, says in (("tensorrt", "this machine has none"), ("tensorrt-rtx", "those of TensorRT alone")):
        seal(copy, target=target, files=listed(copy) | {"engine/engine.json": entry(copy / "engine" / "engine.json")})
        done = cli("serve", copy, *FREE)
        assert done.exit_code == 1 and says in done.stderr and "hint:" in done.stderr


def test_an_installation_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_CONSTRAINT", "/nowhere/constraints.txt")  # trimtab's own, which are not the server's
    monkeypatch.setattr(environment, "SERVER", "nvidia-pytriton==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TargetError, match="could not be installed") as caught:
        environment.install()
    assert "No matching distribution" in caught.value.message and "nowhere" not in caught.value.message
    assert not [path for path in (tmp_path / "tritonserver").iterdir() if path.is_dir()]
    monkeypatch.setattr(environment.sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(environment.sys, "base_prefix", str(tmp_path))
    with pytest.raises(TargetError, match="libpython"):
        environment.install()


def test_a_python_without_a_stub(tmp_path: Path) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    stubs = tmp_path / "lib" / version / "site-packages" / "pytriton" / "tritonserver" / "python_backend_stubs"
    for known in ("3.8", "3.13"):
        (stubs / known).mkdir(parents=True)
    with pytest.raises(TargetError, match=r"it has 3\.8, 3\.13"):
        environment._lay_out_backends(tmp_path)


def test_two_installations_at_once_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    runs: list[str] = []

    def run(command: list[str], folder: Path) -> None:
        runs.append(command[-1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "library.py").write_text("x = 1")
        if not (folder / "lib64").is_symlink():
            (folder / "lib64").symlink_to("lib")

    monkeypatch.setattr(environment, "_run", run)
    monkeypatch.setattr(environment, "_lay_out_backends", lambda folder: None)
    threads = [threading.Thread(target=environment.install) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 3 and environment.installed() is not None
    assert os.environ["TRIMTAB_CACHE"] in str(environment.installed())
    folder = environment.install()
    assert len(runs) == 3
    (folder / "library.py").write_text("x = 2")  # nothing of a damaged environment is run
    assert environment.installed() is None
    assert environment.install() == folder
    assert len(runs) == 6 and (folder / "library.py").read_text() == "x = 1"
    (folder / "lib64").unlink()
    (folder / "lib64").symlink_to(tmp_path)
    assert environment.installed() is None
