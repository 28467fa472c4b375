"""The dense model in the forms that peers start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimtab.compiler.builds.build import Build
from trimtab.compiler.checks.dense import dense_model, dense_source, exported_model
from trimtab.compiler.data import Dataset, batches, read_data
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import Source
from trimtab.passes.graph import load_graph


@dataclass(frozen=True)
class CalibrationData:
    """Inputs for peers that are calibrated statically: the inputs that `trimtab calibrate` takes from the same file.

    Attributes:
        source: the dense model, whose tokenizer turns texts into inputs.
        options: number of samples, and length at which texts are cut.
    """

    source: Source
    dataset: Dataset
    options: Calibration

    @property
    def key(self) -> str:
        """Cache key of the inputs: equal keys mean equal inputs of one model."""
        return f"{self.dataset.sha256} {self.options.model_dump_json()}"

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches of inputs, by name."""
        inputs, options = load_graph(self.source.onnx).inputs, self.options
        names = {tensor.name for tensor in inputs}
        for feed in batches(
            self.dataset, self.source, options.batch_size, options.max_tokens, options.samples, seed=options.seed,
            inputs=inputs,
        ):  # fmt: skip
            yield {name: array for name, array in feed.items() if name in names}


@dataclass(frozen=True)
class PeerModel:
    """One dense model, in the forms that peers start from.

    Attributes:
        canonical: the ONNX file after trimtab's pass `canonicalize`, from which passes and our own peers start.
        export: returns the ONNX file as the user gave it or the exporter wrote it. It is called only if a peer starts
            from that file, which may be gone where the canonical one is in the cache.
        calibration: for peers that need data; None where the user gave none.
    """

    canonical: Path
    export: Callable[[], Path]
    calibration: CalibrationData | None = None

    @classmethod
    def of(cls, onnx: Path) -> PeerModel:
        """One ONNX file for both forms."""
        return cls(onnx, lambda: onnx)


def peer_model(build: Build, *, dense: Path | None = None, data: Path | None = None) -> PeerModel:
    """The dense model of `build`.

    Args:
        dense: the dense ONNX file, in both forms; by default the one that the build was compiled from.
        data: calibration data, used with the calibration options of the build's recipe.

    Raises:
        ModelError: the dense model is gone and not in the cache.
        DataError: the data cannot be read.
    """
    manifest = build.manifest
    dataset = read_data(data) if data else None  # refuse bad data before the export
    canonical = dense or dense_model(build)
    source = dense_source(build, canonical)
    options = Calibration.model_validate(manifest.recipe.get("calibration") or {})
    calibration = CalibrationData(source, dataset, options) if dataset else None
    return PeerModel(canonical, lambda: dense or exported_model(build), calibration)
