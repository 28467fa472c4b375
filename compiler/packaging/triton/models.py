"""The models of a repository: the text model, and the model that runs the build."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.compiler.builds.build import Build
from trimtab.compiler.builds.contents import TOKENIZER
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.decoder_cache import Cache, pasts
from trimtab.compiler.packaging.triton import config as configs
from trimtab.compiler.packaging.triton.carried import write_code
from trimtab.compiler.packaging.triton.engines import VERSION, write_engines
from trimtab.compiler.targets.base import MODEL
from trimtab.compiler.targets.sessions import session_entries, uses_dialect
from trimtab.compiler.task import Task
from trimtab.compiler.workload import Workload
from trimtab.passes.errors import ModelError, TargetError
from trimtab.plugins.library import library_path

SETTINGS = "served.json"
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
_ANSWERS = ("classes", "labels", "score", "embedding", "states")
"""Kinds of tasks with one answer per text."""

_FRONTS = 2  # instances of a text model that calls another model: one tokenizes while the other waits


@dataclass(frozen=True)
class Models:
    """The models to write for `build`; the fields are the arguments of `package_triton`."""

    build: Build
    name: str
    backend: str
    batch: int
    gpu: bool
    seen_at: Path
    environment: str | None

    def write(self, folder: Path) -> tuple[str | None, str | None, tuple[str, ...]]:
        """Write every model into `folder`; returns `kind`, `why` and `models` of a `Package`."""
        manifest = self.build.manifest
        if pasts(tensor.name for tensor in manifest.inputs):
            self._generator(folder)
            return "text", None, (self.name,)
        engine = f"{self.name}_engine"
        if self.backend == "tensorrt":
            engines = write_engines(self.build, folder, engine, batch=self.batch, gpu=self.gpu)
        else:
            engines = [engine]
            self._engine(folder, engine)
        task, why = self._answer()
        if task is None:
            return None, why, tuple(engines)
        self._front(folder, engine, task)
        return task.kind, None, (self.name, *engines)

    def _answer(self) -> tuple[Task | None, str | None]:
        """The task with which texts are answered; or None, and the reason why there is none.

        Raises:
            ModelError: the model's files ask for an activation that trimtab does not compute.
        """
        manifest = self.build.manifest
        others = [tensor.name for tensor in manifest.inputs if tensor.name not in _TEXT_INPUTS]
        if others:
            return None, f"texts do not give the input {others[0]!r}"
        if self.build.tokenizer is None:
            return None, "the build has no tokenizer"
        if not configs.is_batched((*manifest.inputs, *manifest.outputs)):
            return None, "its batch is fixed"
        task = manifest.task
        if task is None or task.kind not in _ANSWERS:
            names = ", ".join(tensor.name for tensor in manifest.outputs)
            return None, f"none of the outputs {names} is a label, a score or an embedding"
        task.apply(np.zeros((1, 1), np.float32))
        return task, None

    def _engine(self, folder: Path, name: str) -> None:
        """Write the model that runs the ONNX file, in Triton's ONNX Runtime backend or in its Python backend."""
        manifest, version = self.build.manifest, folder / name / VERSION
        version.mkdir(parents=True)
        batch = self.batch if configs.is_batched((*manifest.inputs, *manifest.outputs)) else 0
        self._copy_model(version)
        if self.backend == "python":
            settings = {"batched": batch > 0, "dials": self._dials(), "limits": self._limits()}
            self._write_python("engine", version, self._session() | settings)
            parameters = self._python_parameters()
        else:
            threads = str(manifest.recipe["threads"] or 0)
            parameters = {"intra_op_thread_count": threads, "inter_op_thread_count": "1"}
        # Triton's own ONNX Runtime backend has no defaults for inputs that a request omits.
        optional = [dial.name for dial in manifest.dials] if self.backend == "python" else []
        config = configs.model_config(
            name, self.backend, manifest.engine_inputs, manifest.outputs, batch=batch, gpu=self.gpu,
            optional=optional, parameters=parameters,
        )  # fmt: skip
        if self.backend == "onnxruntime":
            config.default_model_filename = MODEL.name
            if library := self._library():
                config.model_operations.op_library_filename.append(str(self.seen_at / name / VERSION / library.name))
        configs.add_warmup(config, folder / name, manifest.engine_inputs, self._shapes())
        configs.write_config(config, folder / name)

    def _shapes(self) -> dict[str, list[int]]:
        """The shape of every input at the workload's opt sizes."""
        manifest = self.build.manifest
        workload = Workload.model_validate(manifest.workload)
        opt = {"batch": workload.batch[1], "tokens": workload.tokens[1]} | {n: s[1] for n, s in workload.dims.items()}
        return {
            tensor.name: [
                size if isinstance(size, int) else opt.get(str(size), opt["tokens" if place else "batch"])
                for place, size in enumerate(tensor.shape or ())
            ]
            for tensor in manifest.engine_inputs
        }

    def _front(self, folder: Path, engine: str, task: Task) -> None:
        manifest, version = self.build.manifest, folder / self.name / VERSION
        version.mkdir(parents=True)
        width = next((tensor.shape or ())[-1] for tensor in manifest.outputs if tensor.name == task.output)
        workload, on_engine = manifest.workload, self.backend == "tensorrt"
        session = self._session() if self.backend == "python" else None
        settings = self._tokenizer(version) | {
            "engine": engine,
            "session": session,
            **asdict(task),
            "dials": self._dials(),
            "inputs": {tensor.name: tensor.dtype for tensor in manifest.inputs},
            "labels": manifest.labels or ([str(i) for i in range(width)] if isinstance(width, int) else []),
            "tokens": [workload["tokens"][0] if on_engine else 1, workload["tokens"][2]],
            "least_batch": workload["batch"][0] if on_engine else 1,
        }
        self._write_python("front", version, settings)
        inputs, optional = [_info("TEXT", "object", 1)], []
        probabilities = _info("PROBABILITIES", "float32", width)
        if task.kind in ("embedding", "states"):
            outputs = [_info("EMBEDDING", "float32", width)]
        else:
            outputs = {
                "classes": [_info("LABEL", "object", 1), probabilities],
                "labels": [_info("LABELS", "object", 1), probabilities],
                "score": [_info("SCORE", "float32", width)],
            }[task.kind]
            inputs, optional = [*inputs, _info("TEXT_PAIR", "object", 1)], ["TEXT_PAIR"]
        dials = [name.upper() for name in self._dial_inputs()]
        inputs, optional = [*inputs, *(_info(name, "float32", 1) for name in dials)], [*optional, *dials]
        config = configs.model_config(
            self.name, "python", inputs, outputs, batch=self.batch, optional=optional,
            gpu=self.gpu and session is not None, instances=_FRONTS if session is None else 1,
            parameters=self._python_parameters(),
        )  # fmt: skip
        configs.write_config(config, folder / self.name)

    def _dial_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that set the dials of a request of texts."""
        dials = self.build.manifest.dials
        return ("speed", *(dial.name for dial in dials)) if dials else ()

    def _dials(self) -> dict[str, Any]:
        """The dials, in the form that `served.common.read_dials` reads."""
        return asdict(self.build.manifest.all_dials)

    def _limits(self) -> dict[str, Any]:
        """The limits of a request's inputs, in the form that `served.common.read_limits` reads."""
        manifest = self.build.manifest
        return {
            "inputs": [tensor.model_dump(mode="json") for tensor in manifest.inputs],
            "packed": [asdict(mask) for mask in manifest.packed],
            "positions": asdict(manifest.positions) if manifest.positions else None,
        }

    def _generator(self, folder: Path) -> None:
        version = folder / self.name / VERSION
        if self.backend == "tensorrt":
            raise TargetError(
                f"{self.build.path}: is a decoder; in Triton, trimtab generates with ONNX Runtime",
                hint="give --backend python, which runs the build's graph",
            )
        if self.build.tokenizer is None:
            raise ModelError(f"{self.build.path}: has no tokenizer", hint="compile a directory that has one")
        version.mkdir(parents=True)
        cache = Cache.of(self.build.model)
        self._copy_model(version)
        settings = self._session() | self._tokenizer(version) | {
            "cache": {"in_place": cache.in_place, "head_dim": cache.head_dim},
            "vocabulary": self.build.manifest.vocabulary, "dials": self._dials(),
        }  # fmt: skip
        self._write_python("generate", version, settings)
        inputs = [
            _info("text_input", "object", 1), _info("stream", "bool", 1), _info("max_tokens", "int32", 1),
            _info("temperature", "float32", 1), _info("top_k", "int32", 1), _info("top_p", "float32", 1),
            _info("seed", "int64", 1), _info("stop", "object", "stops"),
            *(_info(name, "float32", 1) for name in self._dial_inputs()),
        ]  # fmt: skip
        config = configs.model_config(
            self.name, "python", inputs, [_info("text_output", "object", 1), _info("finish_reason", "object", 1)],
            batch=self.batch, gpu=self.gpu, optional=[tensor.name for tensor in inputs[1:]],
            parameters=self._python_parameters(),
        )  # fmt: skip
        config.model_transaction_policy.decoupled = True
        configs.write_config(config, folder / self.name)

    def _session(self) -> dict[str, Any]:
        """Options for opening a session of the model."""
        providers = ["CPUExecutionProvider"]
        if self.gpu:
            providers.insert(0, "CUDAExecutionProvider")
        return {
            "threads": self.build.manifest.recipe["threads"] or 0,
            "entries": session_entries(providers),
            "providers": providers,
            "library": library.name if (library := self._library()) else None,
        }

    def _copy_model(self, version: Path) -> None:
        """Copy the library, and the graph as `model.onnx`, which with external data is a folder, as Triton requires."""
        model, library = self.build.path / MODEL, self._library()
        files = self.build.files_in(MODEL.parent)
        if len(files) == 1:
            shutil.copyfile(model, version / MODEL.name)
        else:
            (version / MODEL.name).mkdir()
            for path in files:
                shutil.copyfile(path, version / MODEL.name / path.name)
        if library is not None:
            shutil.copyfile(library, version / library.name)

    def _library(self) -> Path | None:
        """The library of native kernels, if the graph uses it and it is installed; else the graph's bodies run."""
        return library_path() if uses_dialect(self.build.model) else None

    def _tokenizer(self, version: Path) -> dict[str, Any]:
        """Copy the tokenizer; returns its settings."""
        folder, limit = self.build.tokenizer, self.build.manifest.max_tokens
        assert folder is not None
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(
                f"{folder}: has no tokenizer.json, which a server can read without transformers",
                hint="save the model with a fast tokenizer, and compile it again",
            )
        (version / "tokenizer").mkdir()
        for path in self.build.files_in(TOKENIZER):
            shutil.copyfile(path, version / "tokenizer" / path.name)
        empty = load_tokenizer(folder, limit).encode([""])["input_ids"].shape[1]
        return {"max_tokens": limit, "special_tokens": int(empty)}

    def _write_python(self, model: str, version: Path, settings: dict[str, Any]) -> None:
        write_code(model, version)
        (version / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _python_parameters(self) -> dict[str, str]:
        return {"EXECUTION_ENV_PATH": self.environment} if self.environment else {}


def _info(name: str, dtype: str, width: int | str | None) -> TensorInfo:
    return TensorInfo(name=name, dtype=dtype, shape=("batch", width))
