"""A build that computes every token as it computes generated ones: sparsely, however many tokens a call has."""

from __future__ import annotations

from trimtab.compiler.builds.build import Build, of_one_build
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets.decoded import decoded
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options


@of_one_build
def as_decoded(build: Build, threads: int | None = None) -> Run | None:
    """The model of `build` with each token's own choice of neurons, for texts that are read whole.

    A call of many tokens takes the dense path, so it does not measure the quality of generated tokens.

    Returns:
        None where the build computes prompts and generated tokens alike.
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
    sparse_model = decoded(build.model)
    if sparse_model is None:
        return None
    options = session_options(threads)
    folder = str(build.model.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return OnnxRuntimeRunner(sparse_model, options).run
