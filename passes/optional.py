"""Optional packages: only some of trimtab's functions need them, and trimtab's extras install them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from trimtab.passes.errors import TrimtabError


def install(extra: str) -> str:
    """The command that installs an extra of pyproject.toml, for hints."""
    return f'pip install "trimtab[{extra}]"'


def import_optional(module: str, error: type[TrimtabError], *, what: str, extra: str) -> Any:
    """A module of an optional package.

    Args:
        error: class of the error if the package is missing, or cannot be imported.
        what: the function that needs the package, subject of the message ("a plot").
        extra: the extra that installs the package.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as fault:
        raise missing(what, fault.name or module, error, extra) from fault
    except ImportError as fault:
        package, reason = module.partition(".")[0], (str(fault).strip().splitlines() or ["no reason given"])[-1]
        raise error(
            f"{what} needs {package}, which is installed here but cannot be imported ({reason.strip()})",
            hint=f"install what it lacks, or install it again: pip install --force-reinstall {package}",
        ) from fault


def require_packages(packages: Sequence[str], error: type[TrimtabError], *, what: str, extra: str) -> None:
    """Check that packages are installed, without importing them. Arguments as of `import_optional`."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise missing(what, package, error, extra)


def missing(what: str, module: str, error: type[TrimtabError], extra: str) -> TrimtabError:
    """The error that says which package `what` lacks."""
    return error(f"{what} needs {module}, which is not installed here", hint=install(extra))
