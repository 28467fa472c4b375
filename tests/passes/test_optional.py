"""Packages that are missing are named, with an extra that pyproject.toml has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomllib

from trimtab.passes.errors import DataError
from trimtab.passes.optional import import_optional, require_packages

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NAMED = re.compile(
    r"""trimtab\[([a-z-]+)\]|what=.*\bextra="([a-z-]+)"|^EXTRA = "([a-z-]+)"|\.install\("([a-z-]+)"\)""", re.M
)


def test_every_extra_that_is_named_exists() -> None:
    """In code and documentation."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    files += [path for name in ("compiler", "passes", "plugins", "training") for path in (ROOT / name).rglob("*.py")]
    named = {extra for file in files for found in NAMED.findall(file.read_text()) for extra in found if extra}
    assert {"huggingface", "gguf", "serve", "shards", "peers", "plots", "tensorrt", "tensorrt-rtx"} <= named
    assert named <= EXTRAS.keys()


def test_a_missing_package_is_named_with_its_extra() -> None:
    assert import_optional("json", DataError, what="a test", extra="dev").dumps([]) == "[]"
    require_packages(["json", "numpy"], DataError, what="a test", extra="dev")
    with pytest.raises(DataError, match="a test needs no_such_package, which is not installed here") as caught:
        import_optional("no_such_package.inner", DataError, what="a test", extra="plots")
    assert caught.value.hint == 'pip install "trimtab[plots]"'
    with pytest.raises(DataError, match="a test needs no_such_package"):
        require_packages(["json", "no_such_package"], DataError, what="a test", extra="plots")


def test_a_package_that_cannot_be_imported_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raise ImportError('a long story\\nlibodd.so.1: cannot open shared object file')"
    (tmp_path / "broken_package.py").write_text(text)
    (tmp_path / "needy_package.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    says = r"broken_package, which is installed here but cannot be imported \(libodd.so.1: cannot open [a-z ]*\)"
    with pytest.raises(DataError, match=says) as caught:
        import_optional("broken_package", DataError, what="a test", extra="dev")
    assert "pip install --force-reinstall broken_package" in str(caught.value.hint)
    with pytest.raises(DataError, match="needs no_such_package, which is not installed here"):
        import_optional("needy_package", DataError, what="a test", extra="dev")
