"""recover: insert the weights that distillation of the rewritten model from its dense original has learned."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from trimtab.passes.contract import Pass, PassContext, PassResult, Rounding, first_rounding
from trimtab.passes.errors import NotLearnedError, how_to_learn
from trimtab.passes.graph import values
from trimtab.passes.needs import Learned, Need
from trimtab.passes.profile import Profile

log = logging.getLogger(__name__)

_METHOD = "recover"
_NEAR = 0.01  # relative tolerance of norms: fits and SVDs differ slightly between machines


class Recover(Pass):
    """Replaces initializers by learned ones.

    The weights were learned for one graph. So the passes before must be those of training, with the same options, and
    the initializers must have the same shape, type and norm. Their bits may differ, since all fitted values are
    replaced. Weights trained for zero steps equal the graph's: nothing changes.
    """

    name: ClassVar[str] = _METHOD
    summary: ClassVar[str] = "Put in the weights that `trimtab train --method recover` learned."
    needs: ClassVar[frozenset[Need]] = frozenset({Learned(_METHOD)})

    def check_profile(self, profile: Profile | None, before: Sequence[Pass]) -> None:
        """Check that weights were learned after the passes `before`, with the same options."""
        super().check_profile(profile, before)
        assert profile is not None
        origin = _record(profile).get("from")
        if not isinstance(origin, dict) or origin.keys() != {"passes", "norms"}:
            raise _not_learned("the profile does not say for what graph recover learned its weights")
        _check_passes(before, origin["passes"])

    def run(self, graph: gs.Graph, context: PassContext) -> PassResult:
        """Replace the values of all initializers that were trained.

        Raises:
            NotLearnedError: the Profile has no weights, or they were learned for another graph. The graph is unchanged.
        """
        self.check_profile(context.profile, context.done)
        profile = context.measured()
        record, learned = _record(profile), profile.learned(_METHOD)
        norms = record["from"]["norms"]
        tensors = graph.tensors()
        targets = {n: _target(n, tensors.get(n), value, norms.get(n)) for n, value in learned.items()}
        for name, constant in targets.items():
            constant.values = np.array(learned[name])
        _compare_rounding(record.get("rounding"), first_rounding(context.ahead, context.capability))
        details: dict[str, Any] = {
            key: record[key] for key in ("steps", "before", "after", "rounding") if key in record
        }
        return PassResult(self.name, changed=len(targets), details=details)


def origin_of(graph: gs.Graph, names: Sequence[str], done: Sequence[Pass]) -> dict[str, Any]:
    """The properties of `graph` that another graph must share to use weights learned on it; JSON types.

    Args:
        names: names of the initializers that learn.
        done: the passes that have rewritten the graph.
    """
    tensors = graph.tensors()
    return {
        "passes": [step.written() for step in done],
        "norms": {name: _norm(values(tensors[name])) for name in names},
    }


def _record(profile: Profile) -> dict[str, Any]:
    """The record that training stored in the Profile."""
    return profile.info.learned.get(_METHOD, {})


def _not_learned(message: str) -> NotLearnedError:
    return NotLearnedError(message, method=_METHOD)


def _check_passes(before: Sequence[Pass], trained: list[dict[str, Any]]) -> None:
    have = [step.written() for step in before]
    if have == trained:
        return
    for now, then in zip(have, trained, strict=False):
        if now.keys() == then.keys():
            ((name, new),), (old,) = now.items(), then.values()
            for option in new:
                if new[option] != old.get(option):
                    raise _not_learned(
                        f"{name} runs with {option} = {new[option]}, but recover learned with {old.get(option)}"
                    )
    names = [", ".join(name for step in steps for name in step) or "none" for steps in (have, trained)]
    raise _not_learned(f"the passes before recover are {names[0]}, but it learned behind {names[1]}")


def _compare_rounding(learned: object, coming: Rounding | None) -> None:
    """Warn if weights were learned for one precision and are used in another: correct, but less accurate."""
    now = coming and asdict(coming)
    if isinstance(learned, dict):
        learned = {"per_row": False} | learned  # Profiles of older versions have no `per_row`
    if now != learned:
        log.warning(
            "recover: its weights learned %s, and this recipe %s; %s",
            f"to be rounded ({learned})" if learned else "in floating point",
            f"rounds them ({now})" if now else "leaves them in floating point",
            how_to_learn(_METHOD),
        )


def _target(name: str, tensor: gs.Tensor | None, value: np.ndarray, norm: float | None) -> gs.Constant:
    """The constant to replace, if it equals the one that training started from."""
    if not isinstance(tensor, gs.Constant):
        raise _not_learned(f"recover learned initializer {name!r}, which is not in this graph")
    current = values(tensor)
    same = norm is not None and math.isclose(_norm(current), norm, rel_tol=_NEAR, abs_tol=1e-6)
    if not same or (current.shape, current.dtype) != (value.shape, value.dtype):
        raise _not_learned(f"initializer {name!r} is not the one that recover learned from")
    return tensor


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))
