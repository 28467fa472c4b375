"""The code of a model for Triton's Python backend: copies of trimtab's own modules, so that no code is duplicated.

The server needs numpy and what the modules import: onnxruntime to run a model, tokenizers for texts, pydantic to
generate. It does not need trimtab.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

_SERVED = "trimtab.compiler.packaging.triton.served"
_ERRORS = tuple(f"trimtab.passes.{name}" for name in ("errors", "os_errors", "ort_errors"))
_COMMON = (f"{_SERVED}.common", "trimtab.passes.dials", "trimtab.passes.graph.limits", *_ERRORS)
_TOKENIZER = tuple(
    f"trimtab.compiler.data.{name}" for name in ("tokenizer", "encoding", "cutting", "preparation", "texts")
)
_TOKENIZER += ("trimtab.compiler.schema.json_text", "trimtab.passes.optional")
_SESSION = f"{_SERVED}.session"

CARRIED = {
    "engine": (*_COMMON, _SESSION, "trimtab.compiler.inputs"),
    "front": (*_COMMON, _SESSION, *_TOKENIZER, "trimtab.compiler.task"),
    "generate": (
        *_COMMON,
        _SESSION,
        *_TOKENIZER,
        "trimtab.compiler.counts",
        "trimtab.compiler.generation.generator",
        "trimtab.compiler.generation.sampling",
        "trimtab.compiler.generation.text",
        "trimtab.compiler.decoder_cache",
        "trimtab.compiler.targets.base",
        *(f"trimtab.compiler.targets.segmented.{name}" for name in ("hook", "route", "runner", "segment")),
        "trimtab.compiler.targets.session_segment",
    ),
}
"""Model → the modules that it imports, without the model's own."""

_MODEL = '''\
"""Loaded by Triton's Python backend. The code is trimtab's, in the folder beside this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from {module} import TritonPythonModel  # noqa: E402, F401
'''


def write_code(model: str, folder: Path) -> None:
    """Write `model.py` and the modules of `CARRIED` for `model` into the version folder `folder`."""
    module = f"{_SERVED}.{model}"
    (folder / "model.py").write_text(_MODEL.format(module=module), encoding="utf-8")
    for name in (module, *CARRIED[model]):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        path = folder.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(spec.origin, path)
    for package in (folder / "trimtab").rglob("*"):
        if package.is_dir():
            (package / "__init__.py").touch()
    (folder / "trimtab" / "__init__.py").touch()
