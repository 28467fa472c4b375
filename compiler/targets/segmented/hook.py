"""Work between two segments of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from trimtab.compiler.targets.segmented.route import Route
from trimtab.compiler.targets.segmented.segment import Segment, Values


class Hook:
    """Runs between two segments; by default, it passes values on unchanged.

    Attributes:
        companions: tensor → another tensor that stays in use as long as the first one.
    """

    companions: Mapping[str, str] = {}

    def reads(self, number: int) -> Collection[str]:
        """Tensors that `after` reads behind segment `number`, whether or not a later segment reads them."""
        return ()

    def check(self, route: Route) -> None:
        """Check that the hook fits a model with this route.

        Raises:
            ValueError: it does not fit.
        """

    def begin(self, route: Route) -> Hook:
        """The hook for one call of the model: a new object where the hook has state during the call."""
        return self

    def after(self, number: int, segment: Segment, values: Values) -> Values | None:
        """The values that go on behind `segment`, which has this `number`. It is called behind the last segment, too.

        Args:
            values: every tensor that is still in use; may be changed.

        Returns:
            None where no sample goes on: later segments do not run.
        """
        return values

    def results(self, segment: Segment, values: Values, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs `names` of the whole model, after the last segment.

        Args:
            segment: any segment of the model; its `host` copies values to the host.
        """
        return {name: segment.host(values[name]) for name in names}
