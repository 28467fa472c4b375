"""recover: put in the weights that a short distillation of the rewritten model from its dense self has learned."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.contract import Pass, PassContext, PassResult, Rounding, first_rounding
from trimtab.passes.errors import ProfileError
from trimtab.passes.graph import values

log = logging.getLogger(__name__)

_TRAIN = "train with this recipe and model: `trimtab train MODEL --method recover --recipe RECIPE`"
_NEAR = 0.01  # by which norms may differ: fits and SVDs come out a little different on another machine


class Recover(Pass):
    """Replaces initializers by learned ones.

    They were learned for one graph, so the passes before must be those of training, with the same options, and the
    initializers must be of the same shape, type and norm. Bits need not agree, since all that was fitted is replaced.
    Weights that learned for no step are those of the graph: nothing changes.
    """

    name: ClassVar[str] = "recover"
    summary: ClassVar[str] = "Put in the weights that `trimtab train --method recover` learned."
    needs_profile: ClassVar[bool] = True

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Replace the values of all initializers that were trained.

        Raises:
            ProfileError: the profile has none, or they were learned for another graph. The graph is then unchanged.
        """
        learned = context.profile.learned(self.name) if context.profile is not None else {}
        if context.profile is None or not learned:
            raise ProfileError("the profile holds no weights learned by recover", hint=_TRAIN)
        record = context.profile.info.learned.get(self.name, {})
        origin = record.get("from")
        if not isinstance(origin, dict) or origin.keys() != {"passes", "norms"}:
            raise ProfileError("the profile does not say for what graph recover learned its weights", hint=_TRAIN)
        _check_passes(context.done, origin["passes"])
        tensors = graph.tensors()
        targets = {n: _target(n, tensors.get(n), value, origin["norms"].get(n)) for n, value in learned.items()}
        for name, constant in targets.items():
            constant.values = np.array(learned[name])
        _compare_rounding(record.get("rounding"), first_rounding(context.ahead, context.capability))
        details: dict[str, Any] = {
            key: record[key] for key in ("steps", "before", "after", "rounding") if key in record
        }
        return PassResult(self.name, changed=len(targets), details=details)


def origin_of(graph: gs.Graph, names: Sequence[str], done: Sequence[Pass]) -> dict[str, Any]:
    """What a graph must be like for weights learned on `graph` to fit; JSON types.

    Args:
        names: of the initializers that learn.
        done: the passes that have made the graph.
    """
    tensors = graph.tensors()
    return {
        "passes": [step.written() for step in done],
        "norms": {name: _norm(values(tensors[name])) for name in names},
    }


def _check_passes(done: Sequence[Pass], trained: list[dict[str, Any]]) -> None:
    have = [step.written() for step in done]
    if have == trained:
        return
    for now, then in zip(have, trained, strict=False):
        if now.keys() == then.keys():
            ((name, new),), (old,) = now.items(), then.values()
            for option in new:
                if new[option] != old.get(option):
                    raise ProfileError(
                        f"{name} runs with {option} = {new[option]}, but recover learned with {old.get(option)}",
                        hint=_TRAIN,
                    )
    names = [", ".join(name for step in steps for name in step) or "none" for steps in (have, trained)]
    raise ProfileError(f"the passes before recover are {names[0]}, but it learned behind {names[1]}", hint=_TRAIN)


def _compare_rounding(learned: object, coming: Rounding | None) -> None:
    """Warn where the weights learned for one precision and are about to be put in another: right, but less good."""
    now = coming and asdict(coming)
    if now != learned:
        log.warning(
            "recover: its weights learned %s, and this recipe %s; %s",
            f"to be rounded ({learned})" if learned else "in floating point",
            f"rounds them ({now})" if now else "leaves them in floating point",
            _TRAIN,
        )


def _target(name: str, tensor: gs.Tensor | None, value: np.ndarray, norm: float | None) -> gs.Constant:
    """The constant to replace, if it is what training began with."""
    if not isinstance(tensor, gs.Constant):
        raise ProfileError(f"recover learned initializer {name!r}, which is not in this graph", hint=_TRAIN)
    there = values(tensor)
    same = norm is not None and math.isclose(_norm(there), norm, rel_tol=_NEAR, abs_tol=1e-6)
    if not same or (there.shape, there.dtype) != (value.shape, value.dtype):
        raise ProfileError(f"initializer {name!r} is not the one that recover learned from", hint=_TRAIN)
    return tensor


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))
