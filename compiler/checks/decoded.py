"""A build as it computes the tokens that it generates: sparse, however many are given at once."""

from __future__ import annotations

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets.decoded import decoded
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options


@of_one_build
def as_decoded(build: Build, threads: int | None = None) -> Run | None:
    """The model of `build` with each token's own choice of neurons, for texts that are read whole.

    A prompt of many tokens goes the dense way, so it says nothing about the quality of what is generated.

    Returns:
        None where the build makes no such difference.
    """
    if build.manifest.target != "onnxruntime":
        return None
    if build.manifest.shards > 1:
        from trimtab.compiler.targets.sharded.plan import read_plan
        from trimtab.compiler.targets.sharded.runner import ShardedRunner

        if not any(decoded(path) for path in read_plan(build.path).files(build.path, rank=0)):
            return None
        threads = threads or build.manifest.recipe["threads"]
        return ShardedRunner(build.path, threads=threads, as_decoded=True, manifest_hash=build.hash).run
    changed = decoded(build.model)
    if changed is None:
        return None
    options = session_options(threads)
    folder = str(build.model.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return OnnxRuntimeRunner(changed, options).run
