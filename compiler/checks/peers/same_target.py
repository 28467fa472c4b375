"""The dense model on the target of a build, so that both run on the same runtime and device."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.cache import entry
from trimtab.compiler.caching.remembered import file_hash
from trimtab.compiler.feeds import Run
from trimtab.compiler.sources.source import weights_hash
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.base import ENGINE
from trimtab.compiler.workload import Workload
from trimtab.passes.hashing import hash_bytes


def dense_engine(target: str, dense: Path, workload: Workload, threads: int) -> Run:
    """Build the dense ONNX file for `target`, or take the engine from the cache, and open it.

    Raises:
        TargetError: the target is not available, or does not take the model.
    """
    runtime = get_target(target)
    parts = (target, workload.model_dump_json(), json.dumps(package_versions(), sort_keys=True))
    key = hash_bytes(file_hash(dense), weights_hash(dense), *parts)

    def make(part: Path) -> None:
        part.mkdir()
        runtime.build(dense, workload, part / ENGINE)

    folder = entry("dense-engines", key, make)
    return runtime.open(folder, threads=threads).run
