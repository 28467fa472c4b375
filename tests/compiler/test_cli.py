"""The command line: one message for each error, quiet where nobody watches, and JSON alone under --json."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests import tiny
from trimtab.compiler.cli import console
from trimtab.compiler.cli.app import COMMANDS, app
from trimtab.compiler.cli.console import print_any_text
from trimtab.passes.errors import DataError, PassError, TrimtabError
from trimtab.passes.profile import Profile

PROGRAM = [sys.executable, "-m", "trimtab.compiler.cli"]


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['trimtab', '--help']\nfrom trimtab.compiler.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'numpy', 'pydantic', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, summary in COMMANDS.items():
        assert name in done.stdout and summary[:30] in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.exit_code == 0, done.output
    assert f"{name} [OPTIONS]" in done.stdout


def test_version() -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("trimtab 0.")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["calibrate"],
        ["calibrate", "m", "--samples", "0"],
        ["bench", "b", "--threads", "1025"],
        ["--nonsense"],
        [],
    ],
)
def test_usage_errors_exit_with_2(args: list[str]) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert "Usage" in done.stderr


def with_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """The outcome of a command that raises `error`."""
    module = ModuleType("trimtab.compiler.cli.targets")

    def command() -> None:
        """Fails."""
        raise error

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return run("targets")


@pytest.mark.parametrize(("error", "code", "expected"), [
    (TrimtabError("m: wrong", hint="do this"), 1, "error: m: wrong\nhint: do this\n"),
    (DataError("d line 3: empty"), 1, "error: d line 3: empty\n"),
    (PassError("split", ["a"], TrimtabError("no", hint="yes")), 1, "error: pass split (after a): no\nhint: yes\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    (console.Terminated(), 143, "terminated\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1,
     "error: /x/y: No space left on device\nhint: free some space in /, or"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left on device\nhint: free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 1,
     "error: /x: Permission denied\nhint: change its permissions"),
    (OSError(errno.EMFILE, "Too many open files", "/x"), 1, "error: /x: Too many open files\nhint: too many files"),
    (MemoryError(), 1, "error: not enough memory\nhint: "),
    (RuntimeError("odd"), 1, "error: unexpected RuntimeError: odd\nhint: this is a fault in trimtab: please report"),
])  # fmt: skip
def test_errors_are_one_message(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, expected: str
) -> None:
    done = with_command(monkeypatch, error)
    assert done.exit_code == code
    assert done.stdout == ""
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == expected.count("\n") + (not expected.endswith("\n"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    args = ["calibrate", "m", "--data", str(tmp_path / "none.txt"), "-o", str(tmp_path / "p")]
    quiet = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, check=False)
    loud = subprocess.run([*PROGRAM, "--debug", *args], capture_output=True, text=True, check=False)
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr and quiet.stderr.startswith("error: ")
    assert "Traceback" in loud.stderr and quiet.stderr in loud.stderr


@pytest.mark.parametrize(("what", "message"), [
    ("no model", "no such"), ("no onnx file", "not an ONNX"), ("no FFN", "no FFN"), ("no data", "no such file"),
    ("empty data", "holds no text"), ("not UTF-8", "line 1: not UTF-8"), ("other tensors", "input_ids"),
    ("NaN in weights", "NaN"), ("no folder", "cannot be written"),
])  # fmt: skip
def test_calibrate_says_what_is_wrong(tmp_path: Path, what: str, message: str) -> None:
    model, data, out = tmp_path / "m.onnx", tiny.data(tmp_path / "d.npz"), tmp_path / "out" / "p"
    out.parent.mkdir()
    tiny.model(model, ffn=what != "no FFN", poison=np.nan if what == "NaN in weights" else None)
    if what == "no model":
        model.unlink()
    elif what == "no onnx file":
        model.write_text("hello")
    elif what == "no data":
        data.unlink()
    elif what in ("empty data", "not UTF-8"):
        data = tmp_path / "d.txt"
        data.write_bytes(b"" if what == "empty data" else b"\xff\xfe\n")
    elif what == "other tensors":
        np.savez(data, wrong=np.zeros((2, 2)))
    elif what == "no folder":
        out.parent.rmdir()
    done = run("calibrate", model, "--data", data, "-o", out)
    assert done.exit_code == 1
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("hint: ", "calibrate: "))]
    assert line.startswith("error: ") and message in line
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_calibrate_writes_a_profile_and_plain_lines(tmp_path: Path) -> None:
    model, data, out = tiny.model(tmp_path / "m.onnx"), tiny.data(tmp_path / "d.npz"), tmp_path / "p"
    sizes = ["--samples", "20", "--batch-size", "5", "--states", "9"]
    command = [*PROGRAM, "calibrate", model, "--data", data, "-o", out, *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 1 layers, 20 samples, 240 tokens\n"
    assert done.stderr.splitlines()[0] == "calibrate: 5/20" and done.stderr.splitlines()[-1] == "calibrate: 20/20"
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
    assert Profile.load(out).ffn(0, tiny.NEURONS, tiny.WIDTH).states.shape == (9, tiny.WIDTH)


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    model, data = tiny.model(tmp_path / "m.onnx"), tiny.data(tmp_path / "d.npz")
    ours, theirs = pty.openpty()
    command = [*PROGRAM, "calibrate", model, "--data", data, "-o", tmp_path / "p"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux reports the closed other end so
                break
            if not chunk:
                break
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    assert b"32/32" in shown and b"\x1b[" in shown


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupting_leaves_nothing(number: int, code: int, says: str, tmp_path: Path) -> None:
    model = tiny.model(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", input_ids=tiny.ids(300_000, 12))
    command = [*PROGRAM, "calibrate", model, "--data", tmp_path / "d.npz", "-o", tmp_path / "p"]
    command += ["--samples", "300000", "--batch-size", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("calibrate: ")
        time.sleep(0.2)
        process.send_signal(number)
        rest = process.stderr.read()
    assert process.returncode == code
    assert rest.splitlines()[-1] == says and "Traceback" not in rest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["d.npz", "m.onnx"]


def test_json_has_stdout_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trimtab.compiler.cli.targets")

    def command(json: bool = False) -> None:
        """Prints like a library does."""
        print("chatter")
        with console.progress() as report:
            report("work", 1, 1)
        console.emit_json({"b": 1, "a": [None, "é"]})

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    done = run("targets", "--json")
    assert json.loads(done.stdout) == {"b": 1, "a": [None, "é"]}
    assert "chatter" in done.stderr and "work: 1/1" in done.stderr
    assert "chatter" in run("targets").stdout


def test_json_takes_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        console.emit_json({"x": float("nan")})
    assert capsys.readouterr().out == ""


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(("name", "n"), [("a", 5), ("long name", 1234)])
    assert capsys.readouterr().out == "name          n\na             5\nlong name  1234\n"


@pytest.mark.parametrize("command", ["passes", "targets"])
def test_lists(command: str) -> None:
    plain, as_json = run(command), run(command, "--json")
    assert plain.exit_code == as_json.exit_code == 0, plain.output
    found = json.loads(as_json.stdout)
    assert found
    assert all(each["name"] in plain.stdout for each in found)


def test_options_of_a_pass() -> None:
    done = run("passes", "ffn-split")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("ffn-split: ")
    wrong = run("passes", "ffn-splt")
    assert wrong.exit_code == 1
    assert "did you mean 'ffn-split'" in wrong.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_texts_that_an_output_cannot_hold_are_shown_with_marks(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models write characters of all languages, and a terminal or a pipe may have few."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    print_any_text()
    for stream in streams.values():
        print("a\u6f22b", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"a?b\n"  # type: ignore[attr-defined]
