"""What a target is: a runtime that takes a compiled graph, and the runner it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from trimtab.passes.errors import TargetError

if TYPE_CHECKING:  # a Triton repository carries this module, without what compiles
    import onnx_graphsurgeon as gs

    from trimtab.compiler.engine_options import EngineOptions
    from trimtab.compiler.workload import Workload
    from trimtab.passes.contract import Capability
    from trimtab.passes.crossover import Measure

MODEL = Path("model") / "model.onnx"
"""Where a build directory holds its graph."""

PLAN = Path("model") / "shards.json"
"""Where a build directory says how its graph is divided, if it is."""

ENGINE = Path("engine")
"""Where a build directory holds what the target made of it."""


class Runner(ABC):
    """A loaded engine.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs, in the order of the graph.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output, for arrays of the shapes and types that the graph declares.

        Raises:
            TargetError: an input is missing, unknown, or of a shape or type the engine does not take.
        """

    def steps(self, batch: int, length: int) -> Steps:
        """Room for `batch` rows of at most `length` tokens in the cache of a decoder.

        Raises:
            TargetError: the engine has no cache.
        """
        raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")

    def confirm(self, manifest_hash: str) -> None:  # noqa: B027  (most are one process)
        """Compare the build that was loaded with what the other processes of a launcher have loaded.

        Raises:
            TargetError: it is another one.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to let go)
        """Let go of what the engine holds beyond this process. It may not be run again."""


class Steps(ABC):
    """A decoder that goes on from what it has seen: its cache stays where it is between the calls."""

    @abstractmethod
    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, dials: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Logits [batch, tokens, vocabulary] of new tokens.

        Args:
            input_ids: [batch, tokens], int64. Prompts that are shorter than others are filled up behind.
            attention_mask: [batch, all tokens so far with these], int64; 0 for what fills up.
            dials: of the build, [batch] each, where it has any.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to let go)
        """Let go of the cache. It may not be run again."""


class Target(ABC):
    """A runtime to compile for."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `trimtab targets`."""
    divides: ClassVar[bool] = False
    """Whether it runs a model that is divided among processes."""
    builds_engines: ClassVar[bool] = False
    """Whether the recipe's `engine` section says anything to it."""

    @abstractmethod
    def probe(self) -> Capability:
        """What the runtime can take, found by trying it, once per process.

        Raises:
            TargetError: it is not installed here; the hint says how to install it.
        """

    def cannot_run_here(self) -> str | None:
        """Why what is built cannot be run on this machine, for checks that would; None where it can."""
        return None

    def crossover(self, threads: int | None = None) -> Measure | None:
        """How to tell, for a shape, where its sparse form stops paying; None where it cannot be told.

        Args:
            threads: CPU threads of one run, as `open` takes them.
        """
        return None

    def settle(self, graph: gs.Graph, max_tokens: int | None, shards: int) -> None:  # noqa: B027  (most leave it as it is)
        """Write what all passes have made, in place, as the runtime computes it best: same results, same layers.

        Args:
            max_tokens: of the longest text that may be run, a decoder's past included; None where no limit is known.
            shards: ranks among which it will be divided.
        """

    @abstractmethod
    def build(
        self,
        model: Path,
        workload: Workload,
        out: Path,
        *,
        timeout_s: float = 3600,
        options: EngineOptions | None = None,
    ) -> list[Path]:
        """Make of the ONNX file `model` what the runtime loads.

        Args:
            out: folder for the engine's files, made when needed.
            timeout_s: seconds after which the build is given up.
            options: wishes for engines, of targets that build some.

        Returns:
            The files written. After an error there are none.

        Raises:
            TargetError: the runtime is missing, does not take this graph (names the nodes), or failed.
        """

    @abstractmethod
    def open(
        self, folder: Path, *, threads: int | None = None, shards: int = 1, manifest_hash: str | None = None
    ) -> Runner:
        """Load the build directory `folder`. What the runner needs of it is read now, and nothing later.

        Args:
            threads: CPU threads of one run; None lets the runtime choose.
            shards: processes among which the model is divided.
            manifest_hash: of the build, which processes that are started again find there or refuse.

        Raises:
            TargetError: the runtime or its hardware is missing, or refuses the engine.
        """
