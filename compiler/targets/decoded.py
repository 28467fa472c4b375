"""A model that computes every token as in generation: with its own choice of neurons, however long the call is."""

from __future__ import annotations

from pathlib import Path

import onnx

from trimtab.plugins import DOMAIN, SELECT_BLOCKS


def decoded(path: Path) -> bytes | None:
    """The ONNX file without a limit above which calls take the dense path; None where the file has no such limit."""
    model = onnx.load(str(path), load_external_data=False)
    changed = False
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, SELECT_BLOCKS.name):
            for attribute in node.attribute:
                if attribute.name == "dense_above" and attribute.i >= 0:
                    attribute.i, changed = -1, True
    return model.SerializeToString() if changed else None
