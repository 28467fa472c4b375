"""Real English sentences that every Python has: the first sentences of its standard library's docstrings."""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from pathlib import Path

_MODULES = """
    argparse asyncio calendar collections concurrent configparser csv ctypes datetime decimal difflib email fractions
    ftplib functools hashlib heapq http imaplib importlib inspect ipaddress json logging mailbox multiprocessing pathlib
    pdb pickle platform random shutil smtplib socket sqlite3 ssl statistics string subprocess tarfile tempfile textwrap
    threading tkinter turtle typing unittest urllib uuid xml zipfile
"""


def sentences() -> list[str]:
    """The first sentence of each docstring, each once, in an order that is the same everywhere."""
    library = Path(sysconfig.get_path("stdlib"))
    found: set[str] = set()
    for name in _MODULES.split():
        folder, module = library / name, library / f"{name}.py"
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [module] * module.is_file():
            if "test" not in path.parts and "tests" not in path.parts:
                found |= {s for s in map(_first, _docstrings(path)) if 5 <= len(s.split()) <= 40}
    chosen = sorted(found)
    random.Random(0).shuffle(chosen)
    return chosen


def write(folder: Path, *, calibration: int = 3400, unseen: int = 400) -> tuple[Path, Path]:
    """Two files of texts that share none: to calibrate and learn on, and to judge by."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = sentences()
    parts = {"texts.txt": texts[:calibration], "unseen.txt": texts[calibration : calibration + unseen]}
    for name, part in parts.items():
        (folder / name).write_text("".join(f"{text}\n" for text in part), encoding="utf-8")
    return folder / "texts.txt", folder / "unseen.txt"


def _docstrings(path: Path) -> list[str]:
    tree = ast.parse(path.read_bytes())
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, owners) and (doc := ast.get_docstring(node))]


def _first(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


if __name__ == "__main__":
    print(*write(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo")), sep="\n")
