"""Real English sentences that every installation of trimtab has: the first sentences of docstrings.

    python examples/texts.py FOLDER      # writes texts.txt to calibrate and learn on, unseen.txt to judge by

Both come from Python's standard library; texts.txt also from packages that trimtab depends on. They share no sentence.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path

_MODULES = """
    argparse asyncio calendar collections concurrent configparser csv ctypes datetime decimal difflib email fractions
    ftplib functools hashlib heapq http imaplib importlib inspect ipaddress json logging mailbox multiprocessing pathlib
    pdb pickle platform random shutil smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile textwrap
    threading tkinter turtle typing unittest urllib uuid xml zipfile
"""


_PACKAGES = ("networkx", "numpy", "scipy", "sympy")  # torch needs networkx and sympy


def library_sentences() -> list[str]:
    """The first sentence of each docstring in modules of the standard library, always in the same order."""
    library = Path(sysconfig.get_path("stdlib"))
    chosen: set[str] = set()
    for name in _MODULES.split():
        folder, module = library / name, library / f"{name}.py"
        chosen |= _sentences(folder if folder.is_dir() else module)
    return _shuffled(chosen)


def package_sentences() -> list[str]:
    """The same of all packages of `_PACKAGES` that are installed."""
    chosen: set[str] = set()
    for name in _PACKAGES:
        spec = find_spec(name)
        if spec is not None and spec.origin:
            chosen |= _sentences(Path(spec.origin).parent)
    return _shuffled(chosen)


def write(folder: Path, *, unseen: int = 400, packages: bool = True) -> tuple[Path, Path]:
    """Write texts.txt and unseen.txt, and give their paths.

    Args:
        unseen: sentences to judge by.
        packages: learn on sentences of other packages, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = library_sentences()
    judged = library[-unseen:]
    learned = library[:-unseen]
    if packages:
        learned = _shuffled({*learned, *package_sentences()}.difference(judged))
    for name, part in (("texts.txt", learned), ("unseen.txt", judged)):
        (folder / name).write_text("".join(f"{text}\n" for text in part), encoding="utf-8")
    return folder / "texts.txt", folder / "unseen.txt"


def _sentences(path: Path) -> set[str]:
    """First sentences of 5 to 40 words of the docstrings in a module or in all modules of a folder, tests left out."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path] * path.is_file()
    files = [file for file in files if not {"test", "tests"}.intersection(file.parts)]
    return {text for file in files for text in map(_first, _docstrings(file)) if 5 <= len(text.split()) <= 40}


def _shuffled(texts: set[str]) -> list[str]:
    chosen = sorted(texts)
    random.Random(0).shuffle(chosen)
    return chosen


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes, which Python reports as it parses
        tree = ast.parse(path.read_bytes())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, owners) and (doc := ast.get_docstring(node))]


def _first(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    print(*write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")), sep="\n")
