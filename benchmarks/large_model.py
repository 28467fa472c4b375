"""How much memory a compile takes that touches one layer of a model of 4 GB: python benchmarks/large_model.py --json

Writes a LLaMA-shaped stack of gated FFNs with random fp32 weights in external data and a Profile of random states for
one layer, and compiles it in a process of its own. Limit: the weights that the pass reads, and a few copies of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper

D_MODEL, D_FF, ROWS = 2048, 5632, 32000
LAYER_BYTES = 4 * 3 * D_MODEL * D_FF

COMPILE = """
import json, sys
from trimtab.compiler import compile_model
build = compile_model(sys.argv[1], json.loads(sys.argv[3]), sys.argv[4], profile=sys.argv[2])
print(json.dumps({"peak_bytes": build.manifest.peak_memory_bytes, "seconds": build.manifest.seconds,
                  "changed": build.manifest.passes[0].changed}))
"""


def write_model(folder: Path, gigabytes: float) -> tuple[Path, int]:
    """x + FFN(x), again and again, after a look-up; returns the file and its number of layers."""
    layers = max(1, round((gigabytes * 1e9 - 4 * ROWS * D_MODEL) / LAYER_BYTES))
    rng = np.random.default_rng(0)
    weights: list[TensorProto] = []
    nodes = []
    with open(folder / "model.onnx.data", "wb") as file:

        def weight(name: str, rows: int, columns: int) -> str:
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": "model.onnx.data", "offset": file.tell(), "length": 4 * rows * columns}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write((rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)).data)
            weights.append(tensor)
            return name

        nodes.append(helper.make_node("Gather", [weight("table", ROWS, D_MODEL), "input_ids"], ["x0"]))
        for i in range(layers):
            gate, up = weight(f"gate{i}", D_MODEL, D_FF), weight(f"up{i}", D_MODEL, D_FF)
            down = weight(f"down{i}", D_FF, D_MODEL)
            nodes += [
                helper.make_node("MatMul", [f"x{i}", gate], [f"g{i}"]),
                helper.make_node("Sigmoid", [f"g{i}"], [f"s{i}"]),
                helper.make_node("Mul", [f"g{i}", f"s{i}"], [f"a{i}"]),
                helper.make_node("MatMul", [f"x{i}", up], [f"u{i}"]),
                helper.make_node("Mul", [f"a{i}", f"u{i}"], [f"h{i}"]),
                helper.make_node("MatMul", [f"h{i}", down], [f"y{i}"]),
                helper.make_node("Add", [f"x{i}", f"y{i}"], [f"x{i + 1}"]),
            ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    out = helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["batch", "tokens", D_MODEL])
    graph = helper.make_graph(nodes, "large", [ids], [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx", layers


def write_profile(model: Path, layer: int, states: int = 4096) -> Path:
    """Random states for one layer."""
    from trimtab.compiler import open_source
    from trimtab.passes.profile import FFNStats, Profile, ProfileInfo

    rng = np.random.default_rng(1)
    profile = Profile(ProfileInfo(model=open_source(model).fingerprint, data="random", samples=1, tokens=states))
    h = np.abs(rng.standard_normal(D_FF))
    x = rng.standard_normal((states, D_MODEL), np.float32)
    profile.set_ffn(layer, FFNStats(states, h * states, h * 0, h**2 * states, x))
    profile.save(model.parent / "profile")
    return model.parent / "profile"


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the model.")] = 4.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory(prefix="trimtab-large-") as name:
        folder = Path(name)
        model, layers = write_model(folder, gigabytes)
        profile = write_profile(model, layers // 2)
        recipe = {"passes": [{"ffn-split": {"layers": [layers // 2]}}]}
        start = time.perf_counter()
        command = [sys.executable, "-c", COMPILE, model, profile, json.dumps(recipe), folder / "build"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stderr)
        found = json.loads(run.stdout.splitlines()[-1])
        size = (folder / "model.onnx.data").stat().st_size
    found = {
        "model_bytes": size,
        "layers": layers,
        "onnx": onnx.__version__,
        "wall_s": time.perf_counter() - start,
    } | found
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"{size / 1e9:.1f} GB, {layers} layers, {found['changed']} split: peak {found['peak_bytes'] / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    typer.run(main)
