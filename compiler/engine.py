"""A build, loaded and ready to run: one callable for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.builds.manifest import Manifest
from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import Tokenizer, load_tokenizer
from trimtab.compiler.inputs import check_inputs
from trimtab.compiler.targets import Runner, get_target
from trimtab.passes.errors import ModelError


class Engine:
    """A loaded build.

    Attributes:
        manifest: what the build says of itself.
        inputs, outputs: name, type and shape of each; a dynamic dimension has a name.
        runner: what runs it; generation takes it step by step.
    """

    def __init__(self, build: Build, runner: Runner) -> None:
        self.manifest: Manifest = build.manifest
        self.inputs = build.manifest.inputs
        self.outputs = build.manifest.outputs
        self._build = build
        self.runner = runner
        self._tokenizer: Tokenizer | None = None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: a numpy array for each input, of its type and shape. Nothing is converted or filled in.

        Returns:
            output name → array.

        Raises:
            InputError: an input is missing, unknown, or of another type or shape; an index lies outside its table; a
                mask is none of 0 and 1, or has padding where attention takes it for tokens. Says which, and what is
                wanted.
        """
        check_inputs(self.inputs, inputs, self.manifest.packed)
        return self.runner.run(inputs)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own.

        Raises:
            ModelError: the build has none.
        """
        if self._tokenizer is None:
            if self._build.tokenizer is None:
                raise ModelError(f"{self._build.path}: has no tokenizer", hint="make the inputs yourself and call run")
            self._tokenizer = load_tokenizer(self._build.tokenizer, self.manifest.max_tokens)
        return self._tokenizer

    def tokenize(self, texts: Sequence[Text], max_tokens: int | None = None) -> dict[str, np.ndarray]:
        """Inputs for `run` from texts, by the model's own tokenizer, filled up to the longest.

        Args:
            texts: strings; or pairs of strings, where the model reads two texts together. Of a pair, the longer one is
                cut first.
            max_tokens: texts are cut there; by default at the longest that the workload declares.

        Raises:
            ModelError: the build has no tokenizer, or the engine takes other inputs than texts give.
            InputError: `texts` is no list of strings and pairs, or `max_tokens` leaves no room for a text's own tokens.
        """
        limit = self.manifest.workload["tokens"][-1] if max_tokens is None else max_tokens
        feeds = self.tokenizer.encode(texts, limit)
        feeds["position_ids"] = np.broadcast_to(np.arange(feeds["input_ids"].shape[1]), feeds["input_ids"].shape)
        missing = [tensor.name for tensor in self.inputs if tensor.name not in feeds]
        if missing:
            raise ModelError(f"{self._build.path}: texts do not give the input {missing[0]!r}")
        return {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in self.inputs}

    def close(self) -> None:
        """End the processes of a build in shards; they end with this one otherwise. The engine cannot run any more."""
        self.runner.close()

    def __repr__(self) -> str:
        return f"Engine({str(self._build.path)!r}, target={self.manifest.target!r})"


def load(folder: Path | str, *, threads: int | None = None, verify: bool = True) -> Engine:
    """Load a build.

    Args:
        threads: CPU threads of one run, in each process; by default what the recipe says, else the runtime's own
            choice, which for a build in shards is its share of the cores.
        verify: hash every file first.

    Raises:
        BuildError: not a build, or damaged; names the damaged file.
        TargetError: its runtime or hardware is missing here.
    """
    build = open_build(folder, verify=verify)
    target = get_target(build.manifest.target)
    return Engine(build, target.open(build.path, threads=threads or build.manifest.recipe["threads"]))
