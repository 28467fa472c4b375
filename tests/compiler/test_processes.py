"""How child processes end, in words, and that none goes on when trimtab is killed."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trimtab.compiler.processes import ending, signal_name
from trimtab.compiler.sources import child
from trimtab.passes.errors import ModelError


@pytest.mark.parametrize(
    ("body", "words", "hint"),
    [
        ("exit 7", "failed (exit code 7)", None),
        ("kill -KILL $$", "was ended by SIGKILL", "memory ran out"),
        ("kill -SEGV $$", "crashed (SIGSEGV)", "a library"),
        ("kill -ILL $$", "crashed (SIGILL)", "this processor"),
        ("kill -BUS $$", "crashed (SIGBUS)", "/dev/shm may be full"),
        ("kill -TERM $$", "was ended by SIGTERM", "start again"),
        ("ulimit -c 0; kill -XCPU $$", "was ended by SIGXCPU", "ulimit -t"),
    ],
)
def test_an_ending_has_words_and_a_remedy(body: str, words: str, hint: str | None) -> None:
    found = ending(subprocess.run(["sh", "-c", body], check=False).returncode)
    assert found.words == words
    assert found.hint is None if hint is None else hint in str(found.hint)


def test_every_signal_has_a_name_and_a_remedy() -> None:
    for number in range(1, signal.NSIG):
        found = ending(-number)
        assert signal_name(number) in found.words and found.hint


@pytest.mark.parametrize(("number", "says", "hint"), [(9, "SIGKILL", "memory"), (11, "SIGSEGV", "library")])
def test_an_exporter_that_a_signal_ends(
    number: int, says: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exporter.py").write_text(f"import os; print('layer 3', flush=True); os.kill(os.getpid(), {number})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ModelError, match=f"model: the export .*{says}.*layer 3") as caught:
        child.run_child(
            "exporter", [], tmp_path, makes="model.onnx", origin=Path("model"), what="the export", hint="other means"
        )
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("error", "says", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/proc/model.onnx"), "/proc/model.onnx: No space", "/proc"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: Permission denied", "permissions"),
        (MemoryError(), "not enough memory", "more memory"),
    ],
)
def test_an_exporter_says_what_the_system_refuses(error: Exception, says: str, hint: str, tmp_path: Path) -> None:
    def work() -> None:
        raise error

    assert child.report(tmp_path, work) == 1
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"].startswith(says)
    assert hint in told["hint"]


def test_an_exporter_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "exporter.py").write_text("import time; print('here', flush=True); time.sleep(600)")
    script = """
        import sys
        from pathlib import Path
        from trimtab.compiler.sources.child import run_child
        out = Path(sys.argv[1])
        run_child("exporter", [], out, makes="model.onnx", origin=out, what="the export", hint="none")
    """.replace("\n        ", "\n")
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=tmp_path) as parent:
        started = tmp_path / "export.log"
        while not (started.is_file() and started.read_text()):
            assert parent.poll() is None
            time.sleep(0.02)
        (exporter,) = psutil.Process(parent.pid).children()
        parent.kill()
    deadline = time.monotonic() + 60
    while exporter.is_running() and exporter.status() != psutil.STATUS_ZOMBIE:  # nobody may reap it in a container
        assert time.monotonic() < deadline
        time.sleep(0.02)
