"""The examples: one folder for each command; quick commands run on small models and print what the READMEs show."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import tiny_models
from test_readme import shape
from typer.testing import CliRunner

from trimtab.compiler.cli.app import COMMANDS, app, load
from trimtab.compiler.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *EXAMPLES.rglob("*.md")])
TOPICS = ("python-api", "reranker", "foreign-onnx", "language-model", "triton", "composed", "demo")

AFTER = {
    "validate": "compile", "bench": "compile", "package": "compile", "generate": "language-model", "cost": "reranker",
}  # fmt: skip
"""Example → the one whose files it uses."""

SLOW = {"serve", "triton", "composed", "demo"}
"""Examples that need a server, hours of training or another model; their commands are only read."""

SMALLER = {"--min-quality": "-1", "--max-error": "9", "--seconds": "0.1", "--minutes": "9"}
"""Values of options with which a small model is done in seconds."""


def commands(text: str, *languages: str) -> Iterator[list[str]]:
    """The words of each command in a document's code blocks of these languages, without its comment.

    A README's `bash` blocks run on small models; blocks without a language need a server, a peer or another model.
    """
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if language in languages and re.match(r"(trimtab|python) ", line):
                yield shlex.split(line, comments=True)


def shown(text: str) -> list[str]:
    """The lines of the outputs that a README shows."""
    outputs = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for output in outputs for line in output.splitlines() if line.strip() not in ("", "...")]


def readme(name: str) -> str:
    return (EXAMPLES / name / "README.md").read_text(encoding="utf-8")


def test_every_command_and_topic_has_an_example() -> None:
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == {*COMMANDS, *TOPICS}
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}/README.md)" in index for name in folders)
    for name in COMMANDS:
        assert any(words[:2] == ["trimtab", name] for words in commands(readme(name), "bash")), (
            f"{name}: no command is shown"
        )


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_shows_output(name: str) -> None:
    assert shown(readme(name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_use_options_that_exist(document: Path) -> None:
    for words in commands(document.read_text(encoding="utf-8"), "", "bash"):
        if words[0] == "trimtab" and words[1] in COMMANDS:
            known = {option for each in load(words[1]).params for option in (*each.opts, *each.secondary_opts)}
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("-") and word != "-"}
            given = {word for word in given if not re.fullmatch(r"-\d.*", word)}
            assert given <= known | {"--help"}, f"{shlex.join(words)}: unknown {given - known}"
        elif words[0] == "trimtab":
            assert words[1].startswith("-") or not words[1].isalpha(), f"{shlex.join(words)}: no such command"
        elif words[1].startswith(("examples/", "benchmarks/")):
            assert (ROOT / words[1]).is_file(), f"{words[1]} leads nowhere"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.parent.name)
def test_a_recipe_can_be_read(path: Path) -> None:
    assert load_recipe(path).passes


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the examples, texts, and small models in place of those that packages bring."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, folder / "examples")
    (folder / "texts").mkdir()
    for name, count in (("texts.txt", 300), ("unseen.txt", 60)):
        (folder / "texts" / name).write_text("".join(f"{text}\n" for text in tiny_models.sentences(count)))
    tiny_models.encoder(folder / "minilm")
    tiny_models.decoder(folder / "smollm")
    tiny_models.vision(folder / "focus.onnx")
    return folder


@cache
def run(name: str, place: Path) -> str:
    """What the commands of an example print, once they have run behind those of the example whose files they use."""
    if name in AFTER:
        run(AFTER[name], place)
    models = {"MODEL": "minilm", "SMOLLM": "smollm", "FOCUS": "focus.onnx"}
    printed = []
    for words in commands(readme(name), "bash"):
        words = [re.sub(r"\$(\w+)", lambda match: models[match[1]], word) for word in words]
        words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        if words[:2] == ["trimtab", "train"]:
            words += ["--steps", "2", "--batch-size", "4"]
        if words[1] == "examples/reranker/make.py":
            words.append("2")
        printed.append(_trimtab(words[1:]) if words[0] == "trimtab" else _python(words[1:], place))
    return "\n".join(printed)


def _anywhere(text: str) -> list[str]:
    """The lines without what differs from machine to machine and from model to model."""
    text = re.sub(r"\b[0-9a-f]{64}\b", "HASH", text)
    text = re.sub(r"\S*/repository\b", "repository", text)
    text = re.sub(r"batch \d+(, tokens \d+)?(, padded)?", "a corner", text)
    text = re.sub(r"[+-](?=\d)", "", text)
    text = re.sub(r"^present\.\d+\.\w+", "present", text, flags=re.MULTILINE)
    return shape(re.sub(r"  (yes|no)  ", "  yes  ", text))


def _trimtab(words: list[str]) -> str:
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, f"trimtab {shlex.join(words)}\n{done.output}"
    return f"{done.stderr}\n{done.stdout}" if words[0] == "generate" else done.stdout


def _python(words: list[str], place: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"python {shlex.join(words)}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", sorted({*COMMANDS, *TOPICS} - SLOW))
def test_the_commands_run_and_print_what_is_shown(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "foreign-onnx":
        pytest.importorskip("sklearn")
        pytest.importorskip("PIL")
    monkeypatch.chdir(workplace)
    printed = run(name, workplace)
    lines = iter(_anywhere(printed))
    for line in _anywhere("\n".join(shown(readme(name)))):
        assert line in lines, f"the README shows {line!r}, which was not printed there:\n{printed}"
