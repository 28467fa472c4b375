"""trimtab's public API. Each name is imported at its first use, so that loading a build does not import the compiler.

```python
from trimtab.compiler import compile_model, load

build = compile_model("model/", None, "build/", data="texts.txt")
engine = load("build/")
outputs = engine.run(engine.tokenize(["Hello."]))
```
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.compiler.calibrate import calibrate as calibrate_model
    from trimtab.compiler.engine import load
    from trimtab.compiler.pipeline import compile_model
    from trimtab.compiler.sources import Source, from_torch, open_source

_PUBLIC = {
    "calibrate_model": "calibrate:calibrate",
    "compile_model": "pipeline:compile_model",
    "from_torch": "sources:from_torch",
    "load": "engine:load",
    "open_source": "sources:open_source",
}
"""Public name → "module:name" inside this package. No public name is also a module's: the module would hide it."""

__all__ = ["calibrate_model", "compile_model", "from_torch", "inspect_model", "load", "open_source"]


def inspect_model(model: Source | Path | str, *, tokens: int = 128, allow_pickle: bool = False) -> dict[str, Any]:
    """Return what `trimtab inspect --json` prints: the parts of `model`, the work of each, and what was not recognised.

    Args:
        tokens: sequence length at which attention is counted.
        allow_pickle: read pickled weights, which can run code of their author.

    Raises:
        ModelError: `model` cannot be read.
        InputError: `tokens` is not an integer of at least 1.
    """
    from trimtab.compiler.counts import check_count
    from trimtab.compiler.inspect import describe
    from trimtab.compiler.sources import Source, open_source
    from trimtab.passes.anatomy import find_anatomy

    check_count("tokens", tokens)
    source = model if isinstance(model, Source) else open_source(model, allow_pickle=allow_pickle)
    return describe(find_anatomy(source.graph()), tokens=tokens)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name].split(":")
    return getattr(import_module(f"{__name__}.{module}"), attribute)
