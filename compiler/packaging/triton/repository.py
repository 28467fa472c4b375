"""A model repository of Triton Inference Server, written whole or not at all.

REPO/NAME/            text in: label and probabilities, an embedding, or generated text (Python backend)
REPO/NAME_engine/     tensors in and out: what the build compiled (onnxruntime, tensorrt or Python backend)
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.packaging.triton import config as configs
from trimtab.compiler.packaging.triton.carried import write_code
from trimtab.compiler.targets.base import ENGINE, MODEL
from trimtab.compiler.targets.onnxruntime import session_entries, uses_dialect
from trimtab.compiler.targets.onnxruntime_steps import PAST, Cache
from trimtab.passes.errors import BuildError, ModelError, TargetError
from trimtab.plugins.library import library_path

BACKENDS = ("auto", "onnxruntime", "python", "tensorrt")
SETTINGS = "served.json"
_VERSION = "1"
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_FRONTS = 2  # instances of a front: one tokenizes while the other waits for the engine


@dataclass(frozen=True)
class Package:
    """A written repository.

    Attributes:
        path: the folder for `tritonserver --model-repository`.
        name: of the build in it.
        backend: of the model that runs the build.
        kind: what the text model answers with: "classes", "embedding", "states" (an embedding, their mean) or "text";
            None where there is no text model.
        why: there is none.
        models: names, in the order in which requests pass through them.
    """

    path: Path
    name: str
    backend: str
    kind: str | None
    why: str | None
    models: tuple[str, ...]


def package_triton(
    build: Build,
    out: Path | str,
    *,
    name: str | None = None,
    backend: str = "auto",
    batch: int | None = None,
    gpu: bool | None = None,
    mounted_at: Path | str | None = None,
    environment: str | None = None,
) -> Package:
    """Write `out`, whole or not at all.

    Args:
        name: of the text model; the engine's is the same with "_engine". By default that of the build's folder.
        backend: one of `BACKENDS`; "auto" is the target's own.
        batch: the most samples that Triton joins in one call; by default the most that the workload declares.
        gpu: whether models lie on the GPU; by default those of TensorRT do.
        mounted_at: where the server will see `out`, if elsewhere: ONNX Runtime's backend wants the native kernels by a
            path that it can open.
        environment: EXECUTION_ENV_PATH of the Python models: an archive or folder of an environment.

    Raises:
        BuildError: `out` exists or cannot be written, or tritonclient is not installed.
        ModelError, TargetError: the build is of a kind that Triton does not serve; says why.
    """
    out = Path(out).absolute()
    if out.exists():
        raise BuildError(f"{out}: exists already", hint="give a folder that does not")
    configs.schema()
    chosen = check_backend(build, backend)
    plan = _Plan(
        build=build,
        name=_model_name(name or build.path.resolve().name),
        backend=chosen,
        batch=_batch(build, batch),
        gpu=chosen == "tensorrt" if gpu is None else gpu,
        seen_at=Path(mounted_at) if mounted_at else out,
        environment=environment,
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            part = Path(scratch) / "repository"
            part.mkdir()
            package = plan.write(part)
            part.rename(out)
    except OSError as error:
        raise BuildError(f"{out}: cannot be written ({error.strerror or error})") from error
    return Package(out, *package)


def _model_name(name: str) -> str:
    found = re.sub(r"[^A-Za-z0-9_.-]", "_", name).strip(".")
    if not found:
        raise BuildError(f"{name!r}: no name for a model in Triton", hint="give one of letters and digits with --name")
    return found


def _batch(build: Build, asked: int | None) -> int:
    low, _, high = build.manifest.workload["batch"]
    if asked is not None and not low <= asked <= high:
        raise BuildError(f"batches of {asked}: the build's workload has {low} to {high}", hint="compile it for more")
    return int(asked or high)


def check_backend(build: Build, asked: str) -> str:
    """The backend that `asked`, one of `BACKENDS`, stands for with `build`.

    Raises:
        BuildError, ModelError, TargetError: unknown, or not one that can run the build.
    """
    target, folder = build.manifest.target, build.path
    if asked not in BACKENDS:
        raise BuildError(f"unknown backend {asked!r}", hint=f"known: {', '.join(BACKENDS)}")
    if build.manifest.shards > 1:
        raise ModelError(
            f"{folder}: is divided into {build.manifest.shards} shards, and Triton runs a model in one process",
            hint="compile it without --shards",
        )
    if asked == "auto":
        if target == "tensorrt-rtx":
            raise TargetError(
                f"{folder}: holds an engine of TensorRT-RTX, and Triton's backend loads those of TensorRT alone",
                hint="compile with --target tensorrt, or serve the same graph with --backend onnxruntime or python",
            )
        asked = target
    if asked == "tensorrt" and target != "tensorrt":
        raise TargetError(f"{folder}: was built for {target}", hint="compile with --target tensorrt")
    return asked


@dataclass(frozen=True)
class _Plan:
    """What is written, and how."""

    build: Build
    name: str
    backend: str
    batch: int
    gpu: bool
    seen_at: Path
    environment: str | None

    def write(self, folder: Path) -> tuple[str, str, str | None, str | None, tuple[str, ...]]:
        """Write every model into `folder`; returns what a `Package` says besides its path."""
        manifest = self.build.manifest
        if any(tensor.name.startswith(PAST) for tensor in manifest.inputs):
            self._generator(folder)
            return self.name, "python", "text", None, (self.name,)
        engine = f"{self.name}_engine"
        self._engine(folder, engine)
        kind, why = self._kind()
        if kind is not None:
            self._front(folder, engine, kind)
        models = (engine,) if kind is None else (self.name, engine)
        return self.name, self.backend, kind, why, models

    @property
    def _sizes(self) -> dict[str, int]:
        """The workload's opt sizes."""
        workload = self.build.manifest.workload
        return {name: workload[name][1] for name in ("batch", "tokens")} | {
            name: sizes[1] for name, sizes in workload["dims"].items()
        }

    def _kind(self) -> tuple[str | None, str | None]:
        """What texts are answered with; or None, and why there is no answer."""
        manifest = self.build.manifest
        others = [tensor.name for tensor in manifest.inputs if tensor.name not in _TEXT_INPUTS]
        if others:
            return None, f"texts do not give the input {others[0]!r}"
        if self.build.tokenizer is None:
            return None, "the build has no tokenizer"
        if not configs.is_batched((*manifest.inputs, *manifest.outputs)):
            return None, "its batch is fixed"
        ranks = {tensor.name: len(tensor.shape or ()) for tensor in manifest.outputs}
        if ranks.get("logits") == 2:
            return "classes", None
        if ranks.get("sentence_embedding") == 2:
            return "embedding", None
        if ranks.get("last_hidden_state") == 3:
            return "states", None
        return None, f"none of the outputs {', '.join(ranks)} is a label or an embedding"

    def _engine(self, folder: Path, name: str) -> None:
        manifest, version = self.build.manifest, folder / name / _VERSION
        version.mkdir(parents=True)
        batch = self.batch if configs.is_batched((*manifest.inputs, *manifest.outputs)) else 0
        parameters: dict[str, str] = {}
        if self.backend == "tensorrt":
            shutil.copyfile(self.build.path / ENGINE / "model.engine", version / "model.plan")
        elif self.backend == "onnxruntime":
            self._copy_model(version)
            parameters["intra_op_thread_count"] = str(manifest.recipe["threads"] or 0)
            parameters["inter_op_thread_count"] = "1"
        else:
            self._write_python("engine", version, self._session(version) | {"batched": batch > 0})
            parameters |= self._python_parameters()
        config = configs.model_config(
            name, self.backend, manifest.inputs, manifest.outputs, batch=batch, gpu=self.gpu, parameters=parameters
        )
        if self.backend == "tensorrt":
            config.default_model_filename = "model.plan"
        elif self.backend == "onnxruntime":
            config.default_model_filename = "model.onnx"
            if library := self._copy_library(version):
                seen = self.seen_at / name / _VERSION / library
                config.model_operations.op_library_filename.append(str(seen))
        configs.add_warmup(config, folder / name, manifest.inputs, self._sizes)
        configs.write_config(config, folder / name)

    def _front(self, folder: Path, engine: str, kind: str) -> None:
        manifest, version = self.build.manifest, folder / self.name / _VERSION
        version.mkdir(parents=True)
        output = {"classes": "logits", "embedding": "sentence_embedding", "states": "last_hidden_state"}[kind]
        width = next((tensor.shape or ())[-1] for tensor in manifest.outputs if tensor.name == output)
        workload, on_engine = manifest.workload, self.backend == "tensorrt"
        told = self._tokenizer(version) | {
            "engine": engine,
            "kind": kind,
            "output": output,
            "inputs": {tensor.name: tensor.dtype for tensor in manifest.inputs},
            "labels": manifest.labels or ([str(i) for i in range(width)] if isinstance(width, int) else []),
            "tokens": [workload["tokens"][0] if on_engine else 1, workload["tokens"][2]],
            "least_batch": workload["batch"][0] if on_engine else 1,
        }
        self._write_python("front", version, told)
        outputs = [_info("EMBEDDING", "float32", width)]
        if kind == "classes":
            outputs = [_info("LABEL", "bytes", 1), _info("PROBABILITIES", "float32", width)]
        config = configs.model_config(
            self.name, "python", [_info("TEXT", "bytes", 1)], outputs,
            batch=self.batch, instances=_FRONTS, parameters=self._python_parameters(),
        )  # fmt: skip
        configs.write_config(config, folder / self.name)

    def _generator(self, folder: Path) -> None:
        version = folder / self.name / _VERSION
        if self.backend == "tensorrt":
            raise TargetError(
                f"{self.build.path}: a decoder; in Triton, trimtab generates with ONNX Runtime",
                hint="give --backend python, which runs the build's graph",
            )
        if self.build.tokenizer is None:
            raise ModelError(f"{self.build.path}: has no tokenizer", hint="compile a directory that has one")
        version.mkdir(parents=True)
        cache = Cache.of(self.build.model)
        told = self._session(version) | self._tokenizer(version) | {
            "cache": {"in_place": cache.in_place, "head_dim": cache.head_dim},
        }  # fmt: skip
        self._write_python("generate", version, told)
        inputs = [
            _info("text_input", "bytes", 1), _info("stream", "bool", 1), _info("max_tokens", "int32", 1),
            _info("temperature", "float32", 1), _info("top_k", "int32", 1), _info("top_p", "float32", 1),
            _info("seed", "int64", 1), _info("stop", "bytes", "stops"),
        ]  # fmt: skip
        config = configs.model_config(
            self.name, "python", inputs, [_info("text_output", "bytes", 1), _info("finish_reason", "bytes", 1)],
            batch=self.batch, gpu=self.gpu, optional=[tensor.name for tensor in inputs[1:]],
            parameters=self._python_parameters(),
        )  # fmt: skip
        config.model_transaction_policy.decoupled = True
        configs.write_config(config, folder / self.name)

    def _session(self, version: Path) -> dict[str, Any]:
        """Copy the model, and say how its session is opened."""
        self._copy_model(version)
        providers = ["CPUExecutionProvider"]
        if self.gpu:
            providers.insert(0, "CUDAExecutionProvider")
        return {
            "threads": self.build.manifest.recipe["threads"] or 0,
            "entries": session_entries(providers),
            "providers": providers,
            "library": self._copy_library(version),
        }

    def _copy_model(self, version: Path) -> None:
        """The graph as `model.onnx`; with external data, in a folder of that name, as Triton wants it."""
        model = self.build.path / MODEL
        files = [path for path in model.parent.iterdir() if path.is_file()]
        if len(files) == 1:
            shutil.copyfile(model, version / MODEL.name)
            return
        (version / MODEL.name).mkdir()
        for path in files:
            shutil.copyfile(path, version / MODEL.name / path.name)

    def _copy_library(self, version: Path) -> str | None:
        """The native kernels, where the graph uses them and they are at hand; else the graph's own bodies run."""
        library = library_path() if uses_dialect(self.build.model) else None
        if library is None:
            return None
        shutil.copyfile(library, version / library.name)
        return library.name

    def _tokenizer(self, version: Path) -> dict[str, Any]:
        """Copy the tokenizer, and say what belongs to it."""
        folder, limit = self.build.tokenizer, self.build.manifest.max_tokens
        assert folder is not None
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(
                f"{folder}: has no tokenizer.json, which a server can read without transformers",
                hint="save the model with a fast tokenizer, and compile it again",
            )
        shutil.copytree(folder, version / "tokenizer")
        empty = load_tokenizer(folder, limit).encode([""])["input_ids"].shape[1]
        return {"max_tokens": limit, "special_tokens": int(empty)}

    def _write_python(self, model: str, version: Path, told: dict[str, Any]) -> None:
        write_code(model, version)
        (version / SETTINGS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")

    def _python_parameters(self) -> dict[str, str]:
        found = {"EXECUTION_ENV_PATH": self.environment} if self.environment else {}
        return found | ({"FORCE_CPU_ONLY_INPUT_TENSORS": "yes"} if self.gpu else {})


def _info(name: str, dtype: str, width: int | str | None) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=("batch", width))
