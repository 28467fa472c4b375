"""Random weights in every format, models of the dialect's ops, and what they should compute, in float64."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from scipy.special import erf, expit

from trimtab.plugins.library import register

FORMATS = ("float32", "float16", "bfloat16", "int8", "int4")
Feeds = Mapping[str, np.ndarray]

ONE_INSTRUCTION_SET = "TRIMTAB_ISA" in os.environ
"""Whether test_library.py runs the tests once more for the kernels of one instruction set, which alone differ."""

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "relu_squared": lambda z: np.maximum(z, 0) ** 2,
    "silu": lambda z: z * expit(z),
    "gelu": lambda z: 0.5 * z * (1 + erf(z / np.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "quick_gelu": lambda z: z * expit(1.702 * z),
    "sigmoid": expit,
    "tanh": np.tanh,
}


def weights(
    name: str, rows: int, width: int, form: str, rng: np.random.Generator
) -> tuple[dict[str, gs.Constant], np.ndarray]:
    """Inputs `name` (and `name`_scale) of an op, and what they stand for, [rows, width] in float64."""
    w = rng.standard_normal((rows, width)).astype(np.float32)
    if form == "float32":
        return {name: gs.Constant(name, w)}, w.astype(np.float64)
    if form == "float16":
        half = w.astype(np.float16)
        return {name: gs.Constant(name, half)}, half.astype(np.float64)
    if form == "bfloat16":
        bits = (w.view(np.uint32) >> 16).astype(np.uint16)
        tensor = onnx.helper.make_tensor(name, onnx.TensorProto.BFLOAT16, w.shape, bits.tobytes(), raw=True)
        constant = gs.Constant(name, gs.ir.tensor.LazyValues(tensor))
        return {name: constant}, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if form == "int8":
        q, scale = rng.integers(-128, 128, w.shape).astype(np.int8), rng.random(rows, np.float32) / 100
        return {name: gs.Constant(name, q), f"{name}_scale": gs.Constant(f"{name}_scale", scale)}, q * scale[
            :, None
        ].astype(np.float64)
    q, scale = rng.integers(0, 16, w.shape).astype(np.uint8), rng.random((rows, width // 32), np.float32) / 10
    packed = q[:, 0::2] | (q[:, 1::2] << 4)
    inputs = {name: gs.Constant(name, packed), f"{name}_scale": gs.Constant(f"{name}_scale", scale)}
    return inputs, (q.astype(np.float64) - 8) * np.repeat(scale.astype(np.float64), 32, axis=1)


def graph_of(**inputs: tuple[type, list[int | str]]) -> gs.Graph:
    """An empty graph with these inputs."""
    made = [gs.Variable(name, dtype, shape) for name, (dtype, shape) in inputs.items()]
    return gs.Graph(inputs=made, opset=21, ir_version=10)


def finish(graph: gs.Graph, *outputs: gs.Variable) -> onnx.ModelProto:
    graph.outputs = list(outputs)
    model = gs.export_onnx(graph)
    onnx.checker.check_model(model)
    return model


def native(model: onnx.ModelProto, threads: int = 2) -> ort.InferenceSession:
    """A session with the native kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the other workers need the cores
    assert register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def everywhere(model: onnx.ModelProto, feeds: Feeds) -> dict[str, list[np.ndarray]]:
    """The outputs by the native kernels, by the reference bodies in ONNX Runtime, and by ONNX's own evaluator."""
    kernels = {"native": native(model).run(None, dict(feeds))}
    if ONE_INSTRUCTION_SET:
        return kernels
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kernels | {
        "body": plain.run(None, dict(feeds)),
        "onnx": ReferenceEvaluator(model).run(None, dict(feeds)),
    }


def some_blocks(selections: int, blocks: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks in ascending order, [selections, k], int32."""
    return np.stack([np.sort(rng.choice(blocks, k, replace=False)) for _ in range(selections)]).astype(np.int32)


def mask_of(blocks: np.ndarray, size: int, neurons: int, tokens: int) -> np.ndarray:
    """1 for the neurons that belong to chosen blocks, [tokens, neurons]."""
    mask = np.zeros((len(blocks), neurons // size, size))
    np.put_along_axis(mask, blocks[:, :, None].astype(np.int64), 1, axis=1)
    return np.broadcast_to(mask.reshape(len(blocks), neurons), (tokens, neurons))


def parted(sums: np.ndarray, keep: int, chosen: int) -> bool:
    """Whether the `keep` largest sums of each row are those of any precision: the next one is smaller by far.

    Args:
        sums: [tokens, blocks], 0 where a block is not chosen.
        chosen: blocks of each token; where no more are chosen than are kept, nothing is cut.
    """
    if not 0 < keep < chosen:
        return True
    order = -np.sort(-sums, -1)
    return bool((order[:, keep - 1] - order[:, keep] > 1e-4 * order[:, 0]).all())


def summed(x: np.ndarray, w: np.ndarray) -> float:
    """Size of the numbers that x [tokens, width] @ w.T sums, of which few sums may happen to be small."""
    return float(np.sqrt((x.astype(np.float64) ** 2) @ (w**2).T).max())


def close(
    found: np.ndarray, wanted: np.ndarray, form: str = "float32", scale: float = 1.0, *, together: bool = False
) -> None:
    """Equal up to the rounding of float32 sums; with integer weights, kernels also round x to 16 bits.

    Args:
        scale: of the numbers that were summed, where the wanted ones happen to be smaller.
        together: kernels may round x to bytes where weights are int8: a per cent of `scale`, or two without VNNI; no
            sum errs by six times as much.
    """
    assert found.shape == wanted.shape
    error = 2e-4 if form.startswith("int") else 2e-5
    size = max(1.0, scale, float(np.abs(wanted).max(initial=0)))
    if together and form == "int8" and found.size:
        error = 0.12
        assert np.sqrt(np.square(found - wanted).mean()) <= 0.02 * size
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=error * size)
