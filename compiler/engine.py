"""A build, loaded and ready to run: one callable for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trimtab.compiler.builds.build import Build, read_build
from trimtab.compiler.builds.contents import TOKENIZER
from trimtab.compiler.builds.manifest import Manifest
from trimtab.compiler.data.lazy_tokenizer import LazyTokenizer
from trimtab.compiler.data.texts import Text
from trimtab.compiler.data.tokenizer import Tokenizer
from trimtab.compiler.engine_options import check_threads
from trimtab.compiler.inputs import check_inputs
from trimtab.compiler.targets import Runner, get_target
from trimtab.passes.dials import Setting
from trimtab.passes.errors import ModelError


class Engine:
    """A loaded build.

    Every method may be called from many threads at once. Calls of an ONNX Runtime engine in one process run in
    parallel; calls of a build in shards, and of TensorRT, wait for each other. A loaded engine reads nothing from the
    build's directory, which may be replaced or removed.

    Attributes:
        path: where the build was loaded from.
        manifest: the description of the build.
        hash: sha256 of the manifest, which contains the hashes of all files: it identifies the whole build.
        inputs, outputs: name, type and shape of each; a dynamic dimension has a name.
        dials: numbers that a call may set, with their meanings; most builds have none.
        runner: runs the engine; generation calls it step by step.
    """

    def __init__(self, build: Build, runner: Runner) -> None:
        self.path = build.path
        self.manifest: Manifest = build.manifest
        self.hash = build.hash
        self.inputs = build.manifest.inputs
        self.outputs = build.manifest.outputs
        self.dials = build.manifest.dials
        self.runner = runner
        files = {path.name: path.read_bytes() for path in build.files_in(TOKENIZER)}
        self._tokenizer = LazyTokenizer(build.path / TOKENIZER, files, self.manifest.max_tokens) if files else None

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        dials: Mapping[str, Setting] | None = None,
        speed: Setting | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the engine once.

        Args:
            inputs: a numpy array for each input, of its type and shape. Nothing is converted or filled in.
            dials: dial → value: one number for the whole call, or [batch], one for each sample. A dial that is left out
                has the value at `speed`, or its default.
            speed: 0 (as exact as the build can be) to 1 (as fast as its dials go), or [batch] of these. It sets all
                dials at once, along the path that the build stores.

        Returns:
            output name → array.

        Raises:
            InputError: an input is missing, unknown, or has another type or shape; an index is outside its table; a
                mask is not of 0 and 1, or has padding that attention would take for tokens; a text is longer than the
                model has positions for; a dial is unknown, or its value is not a number or out of range. The message
                names the input and what the engine takes.
        """
        check_inputs(self.inputs, inputs, self.manifest.packed, self.manifest.positions)
        if not self.dials and not dials and speed is None:
            return self.runner.run(inputs)
        batch = len(inputs[self.inputs[0].name])
        return self.runner.run({**inputs, **self.manifest.all_dials.feeds(batch, dials, speed)})

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer.

        Raises:
            ModelError: the build has no tokenizer.
        """
        if self._tokenizer is None:
            raise ModelError(f"{self.path}: has no tokenizer", hint="make the inputs yourself and call run")
        return self._tokenizer.get()

    def tokenize(self, texts: Sequence[Text], max_tokens: int | None = None) -> dict[str, np.ndarray]:
        """Tokenize texts into inputs for `run`, padded to the longest text, or to the one length that the engine
        takes.

        Args:
            texts: strings; or pairs of strings, where the model reads two texts together. In a pair, the longer text is
                cut first.
            max_tokens: texts are cut to this length; by default the longest that the workload declares.

        Raises:
            ModelError: the build has no tokenizer, or the engine takes other inputs than texts give.
            InputError: `texts` is not a list of strings and pairs, or `max_tokens` has no room for a text's own tokens.
        """
        limit = self.manifest.workload["tokens"][-1] if max_tokens is None else max_tokens
        shape = next((tensor.shape for tensor in self.inputs if tensor.name == "input_ids"), None) or ()
        width = shape[1] if len(shape) > 1 and isinstance(shape[1], int) else None
        feeds = self.tokenizer.encode(texts, limit, width=width)
        feeds["position_ids"] = np.broadcast_to(np.arange(feeds["input_ids"].shape[1]), feeds["input_ids"].shape)
        missing = [tensor.name for tensor in self.inputs if tensor.name not in feeds]
        if missing:
            raise ModelError(
                f"{self.path}: texts do not give the input {missing[0]!r}", hint="make the inputs yourself and call run"
            )
        return {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in self.inputs}

    def close(self) -> None:
        """End the processes of a build in shards, which otherwise end with this process: it cannot run any more.

        An engine of one process has nothing to end, and still runs.
        """
        self.runner.close()

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, target={self.manifest.target!r})"


def load(
    folder: Path | str, *, threads: int | None = None, verify: bool = True, trusted_hash: str | None = None
) -> Engine:
    """Load a build. If another process replaces the build meanwhile, the new one is loaded, never parts of both.

    Args:
        threads: CPU threads of one run, in each process; by default the recipe's, else the runtime's own choice, which
            for a build in shards is each process's share of the cores.
        verify: hash every file first.
        trusted_hash: sha256 of the manifest, as `trimtab compile` prints it. Any other build is refused, and every file
            is hashed, whatever `verify` is.

    Raises:
        BuildError: `folder` is not a build, is damaged, or is not the trusted build; names the damaged file.
        TargetError: the runtime or hardware of the build is missing on this machine.
        InputError: `threads` is not an integer from 1 to `MAX_THREADS`.
    """
    check_threads(threads)
    engine = read_build(
        folder, lambda build: _engine(build, threads), verify=verify, trusted_hash=trusted_hash, discard=Engine.close
    )
    engine.runner.confirm(engine.hash)
    return engine


def _engine(build: Build, threads: int | None) -> Engine:
    manifest = build.manifest
    runner = get_target(manifest.target).open(
        build.path, threads=threads or manifest.recipe["threads"], shards=manifest.shards, manifest_hash=build.hash
    )
    try:
        return Engine(build, runner)
    except BaseException:
        runner.close()
        raise
