"""TensorRT and TensorRT-RTX: one path through Polygraphy's loaders, with the builder in a child process."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import onnx

from trimtab.compiler.targets import trials
from trimtab.compiler.targets.base import ENGINE, Runner, Target
from trimtab.compiler.targets.child import run_child
from trimtab.compiler.targets.gpu import gpu_present
from trimtab.compiler.workload import Workload
from trimtab.passes.contract import Capability
from trimtab.passes.errors import TargetError
from trimtab.passes.graph import load_graph

ENGINE_FILE, INFO_FILE = "model.engine", "engine.json"

_SHOWN = 5  # refused nodes that a message names
_PARSE_S = 600.0


class TensorRT(Target):
    """A serialized, strongly typed engine, with one optimization profile from the workload."""

    name = "tensorrt"
    summary = "an engine for this machine's NVIDIA GPU; built on a machine with that GPU"
    package: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = 'pip install "trimtab[tensorrt]", with NVIDIA\'s own package index as an extra index'
    rtx: ClassVar[bool] = False

    def probe(self) -> Capability:
        self._require()
        return _probe(self.name)

    def check(self, model: Path) -> None:
        """Let TensorRT's parser read `model`, without building.

        Raises:
            TargetError: it refuses nodes; names them.
        """
        self._require()
        self._refuse(self.parse([model])[0])

    def build(self, model: Path, workload: Workload, out: Path, *, timeout_s: float = 3600) -> list[Path]:
        self._require()
        profile = workload.shapes(load_graph(model))
        engine, info = out / ENGINE_FILE, out / INFO_FILE
        part = out / (ENGINE_FILE + ".part")
        try:
            out.mkdir(parents=True, exist_ok=True)
            with _removed_on_error(part, engine, info):
                answer = self._child({"models": [str(model)], "engine": str(part), "profile": profile}, timeout_s)
                self._refuse(answer["refused"][0])
                part.replace(engine)
                info.write_text(json.dumps({"target": self.name} | answer["engine"], indent=2) + "\n")
        except OSError as error:
            raise TargetError(f"{out}: cannot write the engine ({error})") from error
        return [engine, info]

    def open(self, folder: Path, *, threads: int | None = None) -> Runner:
        self._require()
        if not gpu_present():
            raise TargetError(
                f"{folder}: a {self.name} engine runs on an NVIDIA GPU, and this machine has none",
                hint="open it on a machine with a GPU and its driver, or compile with --target onnxruntime",
            )
        from trimtab.compiler.targets.tensorrt_runner import TensorRTRunner

        return TensorRTRunner(folder / ENGINE / ENGINE_FILE, rtx=self.rtx)

    def _require(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise TargetError(f"target {self.name} is not installed here", hint=self.install)

    def _child(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        env = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if self.rtx else "0"}
        return run_child(self.name, job, timeout_s=timeout_s, env=env)

    def parse(self, models: Sequence[Path]) -> list[list[dict[str, str]]]:
        """For each of `models`, what the parser refuses: a list of {node, op, reason}."""
        job: dict[str, Any] = {"models": [str(model) for model in models], "engine": None, "profile": {}}
        found: list[list[dict[str, str]]] = self._child(job, _PARSE_S)["refused"]
        return found

    def _refuse(self, refused: list[dict[str, str]]) -> None:
        if not refused:
            return
        lines = [f"{r['op']} {r['node']!r}: {r['reason']}" if r["op"] else r["reason"] for r in refused[:_SHOWN]]
        more = [f"and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        raise TargetError(
            "\n  ".join([f"{self.name} does not take this graph; its parser refuses", *lines, *more]),
            hint="leave out the passes that made these nodes, export with standard ops, or choose --target onnxruntime",
        )


class TensorRTRTX(TensorRT):
    """The same for TensorRT-RTX, whose engines are portable between GPUs and are built without one."""

    name = "tensorrt-rtx"
    summary = "a portable engine for NVIDIA RTX GPUs; built on any machine, GPU or none"
    package = "tensorrt_rtx"
    install = 'pip install "trimtab[tensorrt-rtx]"'
    rtx = True


@contextmanager
def _removed_on_error(*files: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


@lru_cache
def _probe(name: str) -> Capability:
    target = TensorRTRTX() if name == TensorRTRTX.name else TensorRT()
    widths = (2, 4, 8)
    tried = [*(trials.blockwise(bits)[0] for bits in widths), trials.half()]
    with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
        paths = [Path(folder) / f"{position}.onnx" for position in range(len(tried))]
        for model, path in zip(tried, paths, strict=True):
            onnx.save(model, path)
        *blockwise, half = (not refused for refused in target.parse(paths))
    taken = frozenset(bits for bits, fits in zip(widths, blockwise, strict=True) if fits)
    return Capability(weight_bits=taken, float16=half)
