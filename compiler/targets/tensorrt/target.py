"""TensorRT and TensorRT-RTX as targets."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs

from trimtab.compiler.cache import updated
from trimtab.compiler.engine_options import EngineOptions
from trimtab.compiler.targets import trials
from trimtab.compiler.targets.base import ENGINE, Runner, Target
from trimtab.compiler.targets.child import run_child
from trimtab.compiler.targets.tensorrt.info import INFO_FILE, EngineInfo
from trimtab.compiler.targets.tensorrt.prepare import Prepared, prepare
from trimtab.compiler.workload import Workload
from trimtab.passes import optional
from trimtab.passes.contract import Capability
from trimtab.passes.errors import TargetError
from trimtab.passes.lower import lower
from trimtab.passes.os_errors import reason, remedy
from trimtab.passes.temporary import temporary_folder
from trimtab.plugins.driver import compute_capability, gpu_present

_SHOWN = 5  # refused nodes that a message names
_PARSE_S = 600.0  # time limit of a parse in seconds


class TensorRT(Target):
    """Serialized, strongly typed engines, with optimization profiles from the workload."""

    name = "tensorrt"
    summary = "an engine for this machine's NVIDIA GPU; built on a machine with that GPU"
    builds_engines = True
    package: ClassVar[str] = "tensorrt"
    install: ClassVar[str] = optional.install("tensorrt") + ", with NVIDIA's own package index as an extra index"
    rtx: ClassVar[bool] = False

    def probe(self) -> Capability:
        self._require()
        return _probe(type(self))

    def build(
        self,
        model: Path,
        workload: Workload,
        out: Path,
        *,
        timeout_s: float = 3600,
        options: EngineOptions | None = None,
    ) -> list[Path]:
        self._require()
        options = options or EngineOptions()
        self._check_gpu(options)
        files: list[Path] = []
        try:
            out.mkdir(parents=True, exist_ok=True)
            with _removed_on_error(files), tempfile.TemporaryDirectory(prefix=".graph-", dir=out) as scratch:
                prepared = prepare(model, workload, Path(scratch), plugins=not self.rtx, segments=options.segments)
                if prepared.plugins:
                    what = "the compiler of plugins' kernels"
                    optional.require_packages(["triton"], TargetError, what=what, extra="tensorrt")
                names = [f"model.{number}.engine" for number in range(len(prepared.models))]
                names = names if len(names) > 1 else ["model.engine"]
                parts = [out / f"{name}.part" for name in names]
                files += [*parts, *(out / name for name in names), out / INFO_FILE]
                with self._timing_cache() as timing_cache:
                    answer = self._child(self._job(prepared, parts, options, timing_cache), timeout_s)
                self._refuse([node for refused in answer["refused"] for node in refused])
                for part, name in zip(parts, names, strict=True):
                    part.replace(out / name)
                info = self._info(answer["built"], names, prepared, options)
                info.write(out)
                if self.cannot_run_here() is None and options.meant_for(compute_capability()):
                    self._load_once(info, out, timeout_s)
        except OSError as error:
            raise TargetError(f"{out}: cannot write the engine ({reason(error)})", hint=remedy(error, out)) from error
        return [*(out / name for name in names), out / INFO_FILE]

    def open(
        self, folder: Path, *, threads: int | None = None, shards: int = 1, manifest_hash: str | None = None
    ) -> Runner:
        self._require()
        info = EngineInfo.read(folder / ENGINE)
        info.check(folder, self._version(), compute_capability())
        if not gpu_present():
            raise TargetError(
                f"{folder}: a {self.name} engine runs on an NVIDIA GPU, and this machine has none",
                hint="open it on a machine with a GPU and its driver, or compile with --target onnxruntime",
            )
        from trimtab.compiler.targets.tensorrt.runner import TensorRTRunner

        return TensorRTRunner(folder / ENGINE, info, rtx=self.rtx)

    def cannot_run_here(self) -> str | None:
        gpu = compute_capability()
        if not gpu_present():
            return f"a {self.name} engine runs on a GPU, and this machine has none"
        supported = _known_gpus(type(self))
        if gpu is None or not supported or gpu in supported or _number(gpu) > max(map(_number, supported)):
            return None
        return f"{self.name} runs on no GPU of compute capability {gpu}, which this machine has"

    def _require(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise TargetError(f"target {self.name} is not installed here", hint=self.install)

    def _check_gpu(self, options: EngineOptions) -> None:
        """Check the GPU before the long build: TensorRT measures tactics on the GPU of the engine."""
        if self.rtx:
            return
        if not gpu_present():
            raise TargetError(
                f"a {self.name} engine is built on the GPU that it is for, and this machine has none",
                hint="compile there, or with --target tensorrt-rtx, which needs no GPU to build",
            )
        if options.gpus:
            raise TargetError(f"engine.gpus: {self.name} builds for the GPU of this machine", hint="remove engine.gpus")

    def _version(self) -> str | None:
        """Version of the installed library, without importing it; None where no package has it."""
        owners = importlib.metadata.packages_distributions().get(self.package, [])
        return importlib.metadata.version(owners[0]) if owners else None

    def _job(
        self, prepared: Prepared, parts: Sequence[Path], options: EngineOptions, timing_cache: Path | None
    ) -> dict[str, Any]:
        return {
            "models": [str(model) for model in prepared.models],
            "plugins": list(prepared.plugins),
            "build": {
                "engines": [str(part) for part in parts],
                "profiles": [
                    [{"name": profile.name, "shapes": profile.shapes} for profile in profiles]
                    for profiles in prepared.profiles
                ],
                "gpus": list(options.gpus),
                "weight_streaming": options.weight_streaming,
                "refit": options.refit,
                "timing_cache": timing_cache and str(timing_cache),
            },
        }

    def _timing_cache(self) -> AbstractContextManager[Path | None]:
        """The file of measured tactics for one version and one GPU; None for RTX, whose build measures nothing."""
        if self.rtx:
            return nullcontext()
        return updated("timing", f"{self.name}-{self._version()}-{compute_capability()}.cache")

    def _info(
        self, built: dict[str, Any], names: Sequence[str], prepared: Prepared, options: EngineOptions
    ) -> EngineInfo:
        engines = [{"file": name} | engine for name, engine in zip(names, built.pop("engines"), strict=True)]
        return EngineInfo(
            target=self.name,
            **built,
            compute_capabilities=options.gpus,
            gpu=None if self.rtx else compute_capability(),
            weight_streaming=options.weight_streaming,
            refit=options.refit,
            lowered=prepared.lowered,
            inputs=prepared.inputs,
            outputs=prepared.outputs,
            exits=prepared.exits,
            engines=engines,
        )

    def _load_once(self, info: EngineInfo, out: Path, timeout_s: float) -> None:
        """Load and run each engine once in a fresh process, as a server does, so that no broken engine is kept."""
        loads = [
            {
                "engine": str(out / engine.file),
                "shapes": {name: opt for name, (_, opt, _) in engine.profiles[0].shapes.items()},
            }
            for engine in info.engines
        ]
        try:
            self._child({"models": [], "build": None, "load": loads}, timeout_s)
        except TargetError as error:
            raise TargetError(f"the finished engine does not load: {error.message}", hint=error.hint) from error

    def _child(self, job: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        env = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if self.rtx else "0"}
        return run_child(self.name, job, timeout_s=timeout_s, env=env)

    def parse(self, models: Sequence[Path]) -> list[list[dict[str, str]]]:
        """For each of `models`, the nodes that the parser refuses: a list of {node, op, reason}."""
        job: dict[str, Any] = {"models": [str(model) for model in models], "build": None}
        refused: list[list[dict[str, str]]] = self._child(job, _PARSE_S)["refused"]
        return refused

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
    """The target TensorRT-RTX, whose engines are portable between GPUs and are built without one."""

    name = "tensorrt-rtx"
    summary = "a portable engine for NVIDIA RTX GPUs; built on any machine, GPU or none"
    package = "tensorrt_rtx"
    install = optional.install("tensorrt-rtx")
    rtx = True


@contextmanager
def _removed_on_error(files: list[Path]) -> Iterator[None]:
    """Delete `files` if the body fails; the body adds files to the list before it writes them."""
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _number(gpu: str) -> tuple[int, ...]:
    """A compute capability as numbers, for comparison."""
    return tuple(int(part) for part in gpu.split("."))


@lru_cache
def _known_gpus(kind: type[TensorRT]) -> tuple[str, ...]:
    """Compute capabilities that the library can build for; none where it builds for the GPU of this machine."""
    return tuple(kind()._child({"models": [], "build": None}, _PARSE_S)["gpus"])


@lru_cache
def _probe(kind: type[TensorRT]) -> Capability:
    widths = (2, 4, 8)
    counted = gs.import_onnx(trials.counted())
    lower(counted)
    models = [*(trials.blockwise(bits)[0] for bits in widths), trials.half(), trials.largest()[0]]
    models.append(gs.export_onnx(counted))
    with temporary_folder("probe") as folder:
        paths = [folder / f"{position}.onnx" for position in range(len(models))]
        for model, path in zip(models, paths, strict=True):
            onnx.save(model, path)
        *blockwise, half, integers, counts = (not refused for refused in kind().parse(paths))
    weight_bits = frozenset(bits for bits, fits in zip(widths, blockwise, strict=True) if fits)
    return Capability(weight_bits=weight_bits, float16=half, integer_products=integers, counted_sizes=counts)
