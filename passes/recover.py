"""recover: put in the weights that a short distillation of the rewritten model from its dense self has learned."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.contract import Pass, PassContext, PassResult
from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import fingerprint

_TRAIN = "train with this recipe and model: `trimtab train MODEL --method recover --recipe RECIPE`"


class Recover(Pass):
    """Replaces initializers by learned ones.

    What comes before it in the recipe must make the very graph that was trained, so each initializer's fingerprint must
    be the one it had when training began. Weights that learned for no step are those of the graph: nothing changes.
    """

    name: ClassVar[str] = "recover"
    summary: ClassVar[str] = "Put in the weights that `trimtab train --method recover` learned."
    needs_profile: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Replace the values of all initializers that were trained.

        Raises:
            ProfileError: the profile has none, or they were learned from another graph. The graph is then unchanged.
        """
        learned = context.profile.learned(self.name) if context.profile is not None else {}
        if context.profile is None or not learned:
            raise ProfileError("the profile holds no weights learned by recover", hint=_TRAIN)
        record = context.profile.info.learned.get(self.name, {})
        origin = record.get("from")
        tensors = graph.tensors()
        targets = {name: _check(name, tensors.get(name), value, origin) for name, value in learned.items()}
        for name, constant in targets.items():
            constant.values = np.array(learned[name])
        details = {key: record[key] for key in ("steps", "before", "after") if key in record}
        return PassResult(self.name, changed=len(targets), details=details)


def _check(name: str, tensor: gs.Tensor | None, value: np.ndarray, origin: Any) -> gs.Constant:
    """The constant to replace, if it is still what training began with."""
    known = origin.get(name) if isinstance(origin, dict) else None
    if not isinstance(tensor, gs.Constant):
        why = "is not in this graph"
    elif tuple(tensor.shape) != value.shape or fingerprint(tensor) != known:
        why = "changed since training (other options of the passes before recover, or another model)"
    else:
        return tensor
    raise ProfileError(f"recover: initializer {name!r} {why}", hint=_TRAIN)
