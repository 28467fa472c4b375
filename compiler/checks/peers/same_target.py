"""The dense model on the target that a build was made for, so that both run on the same runtime and device."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.cache import cache_dir
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.workload import Workload
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.io import model_fingerprint


def dense_engine(target: str, dense: Path, workload: Workload, threads: int) -> Run:
    """Build the dense ONNX file for `target`, or take the engine from the cache, and open it.

    Raises:
        TargetError: the target is not available, or does not take the model.
    """
    runtime = get_target(target)
    key = hashlib.sha256(dense.read_bytes())
    for part in (model_fingerprint(load_graph(dense)), target, workload.model_dump_json(), str(package_versions())):
        key.update(part.encode())
    folder = cache_dir() / "dense-engines" / key.hexdigest()
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            runtime.build(dense, workload, Path(made) / "build" / ENGINE)
            (Path(made) / "build").rename(folder)
    return runtime.open(folder, threads=threads).run
