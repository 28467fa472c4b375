"""What is done between two segments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.segmented.segment import Segment, Values


class Hook:
    """Between two segments; by default values are handed on as they are.

    Attributes:
        companions: tensor → another one, which stays in use as long as that.
    """

    companions: Mapping[str, str] = {}

    def reads(self, number: int) -> Collection[str]:
        """Tensors that `after` reads behind the segment `number`, whether or not a segment reads them."""
        return ()

    def check(self, route: Route) -> None:
        """That it fits a model with this route.

        Raises:
            ValueError: it does not.
        """

    def begin(self, route: Route) -> Hook:
        """The hook for one call of the model: another object where it keeps something during the call."""
        return self

    def after(self, number: int, segment: Segment, values: Values) -> Values | None:
        """The values to go on with behind `segment`, the one of this `number`, the last one too.

        Args:
            values: every tensor that is still in use; may be changed.

        Returns:
            None where nothing is left to go on with: later segments are not run.
        """
        return values

    def results(self, segment: Segment, values: Values, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs `names` of the whole model, when the last segment has run.

        Args:
            segment: any, for its `host`.
        """
        return {name: segment.host(values[name]) for name in names}
