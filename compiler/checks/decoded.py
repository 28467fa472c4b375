"""A build as it computes the tokens that it generates: sparse, however many are given at once."""

from __future__ import annotations

import onnx

from trimtab.compiler.builds.build import Build
from trimtab.compiler.feeds import Run
from trimtab.compiler.targets.base import MODEL
from trimtab.compiler.targets.onnxruntime import OnnxRuntimeRunner, session_options
from trimtab.plugins import DOMAIN, SELECT_BLOCKS


def as_decoded(build: Build, threads: int | None = None) -> Run | None:
    """The model of `build` with each token's own choice of neurons, for texts that are read whole.

    A prompt of many tokens goes the dense way, so it says nothing about the quality of what is generated.

    Returns:
        None where the build makes no such difference.
    """
    if build.manifest.target != "onnxruntime":
        return None
    path = build.path / MODEL
    model = onnx.load(str(path), load_external_data=False)
    changed = False
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, SELECT_BLOCKS.name):
            for attribute in node.attribute:
                if attribute.name == "dense_above" and attribute.i >= 0:
                    attribute.i, changed = -1, True
    if not changed:
        return None
    options = session_options(threads)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
    return OnnxRuntimeRunner(model.SerializeToString(), options).run
