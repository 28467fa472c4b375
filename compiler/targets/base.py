"""The interface of a target, a runtime that takes a compiled graph, and of the runner that it opens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from trimtab.passes.errors import TargetError

if TYPE_CHECKING:  # a Triton repository carries this module without the compiler
    import onnx_graphsurgeon as gs

    from trimtab.compiler.engine_options import EngineOptions
    from trimtab.compiler.workload import Workload
    from trimtab.passes.contract import Capability
    from trimtab.passes.crossover import Measure

MODEL = Path("model") / "model.onnx"
"""Path of the graph in a build directory."""

PLAN = Path("model") / "shards.json"
"""Path of the plan of shards in a build directory, where the graph is divided."""

ENGINE = Path("engine")
"""Folder of the target's engines in a build directory."""


class Runner(ABC):
    """A loaded engine.

    Attributes:
        inputs: names of the engine's inputs.
        outputs: names of the engine's outputs, in the order of the graph.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @abstractmethod
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All outputs, for arrays of the shapes and types that the graph declares.

        Raises:
            TargetError: an input is missing or unknown, or has a shape or type that the engine does not take.
        """

    def steps(self, batch: int, length: int) -> Steps:
        """A generation with room for `batch` rows of at most `length` tokens in the cache of a decoder.

        Raises:
            TargetError: the engine has no cache.
        """
        raise TargetError("this engine has no cache of keys and values", hint="compile a causal language model")

    def confirm(self, manifest_hash: str) -> None:  # noqa: B027  (most are one process)
        """Compare the loaded build with the builds that the other processes of a launcher have loaded.

        Raises:
            TargetError: the builds differ.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to release)
        """Release the engine's resources outside this process. The engine may not run again."""

    def stop(self) -> None:
        """End runs that are under way in other threads, as far as the runtime can. The engine may not run again."""
        self.close()


class Steps(ABC):
    """A generation of a decoder: its cache is kept between the calls."""

    @abstractmethod
    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, dials: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Logits [batch, tokens, vocabulary] of new tokens.

        Args:
            input_ids: [batch, tokens], int64. Shorter prompts are padded at the end.
            attention_mask: [batch, all tokens so far, these included], int64; 0 at padding.
            dials: values of the build's dials, [batch] each, where it has any.
        """

    def close(self) -> None:  # noqa: B027  (most have nothing to release)
        """Release the cache. The generation may not run again."""


class Target(ABC):
    """A runtime to compile for."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `trimtab targets`."""
    divides: ClassVar[bool] = False
    """Whether the target runs a model that is divided into shards."""
    builds_engines: ClassVar[bool] = False
    """Whether the target reads the recipe's section `engine`."""

    @abstractmethod
    def probe(self) -> Capability:
        """What the runtime can take, tried out once per process.

        Raises:
            TargetError: the runtime is not installed here; the hint says how to install it.
        """

    def cannot_run_here(self) -> str | None:
        """The reason why an engine of this target cannot run on this machine; None where it can."""
        return None

    def crossover(self, threads: int | None = None) -> Measure | None:
        """A function that measures, for a shape, where the sparse form stops being faster; None if unsupported.

        Args:
            threads: CPU threads of one run, as `open` takes them.
        """
        return None

    def settle(self, graph: gs.Graph, max_tokens: int | None, shards: int) -> None:  # noqa: B027  (most keep the graph)
        """Rewrite the graph after all passes, in place, into the form that the runtime computes fastest.

        Results and layers stay the same.

        Args:
            max_tokens: tokens of the longest text that may run, a decoder's past included; None without a limit.
            shards: number of ranks into which the graph will be divided.
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
        """Build the files that the runtime loads from the ONNX file `model`.

        Args:
            out: folder for the engine's files, created when needed.
            timeout_s: time limit of the build in seconds.
            options: engine options, for targets that build engines.

        Returns:
            The files written. After an error, none remain.

        Raises:
            TargetError: the runtime is missing, does not take this graph (names the nodes), or failed.
        """

    @abstractmethod
    def open(
        self, folder: Path, *, threads: int | None = None, shards: int = 1, manifest_hash: str | None = None
    ) -> Runner:
        """Load the build directory `folder`. The runner reads all its files now, and none later.

        Args:
            threads: CPU threads of one run; None lets the runtime choose.
            shards: number of processes into which the model is divided.
            manifest_hash: hash of the build's manifest; processes that start again refuse a build with another hash.

        Raises:
            TargetError: the runtime or its hardware is missing, or refuses the engine.
        """
