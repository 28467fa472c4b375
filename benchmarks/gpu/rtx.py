"""TensorRT-RTX engines on a GPU, dense and compiled: are they right, and how long do they take?

    python benchmarks/gpu/rtx_prepare.py FOLDER            here or on any machine: builds the engines, no GPU needed
    python benchmarks/gpu/rtx.py FOLDER --json FILE        on a machine with a GPU; needs numpy, torch and tensorrt_rtx

FOLDER holds, for each case, engines, engine.json and cases.npz with inputs and what ONNX Runtime made of them on a CPU.
Each case runs in a process of its own, so that one that crashes or hangs loses nothing but itself. Times are medians of
replays of a CUDA graph, or of launches where the engine cannot be captured, between CUDA events, after warming up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

WARM, REPLAYS = 20, 100
ROWS, TOKENS = 8, 16  # every so manieth of an output is compared
PAST, PRESENT = "past_key_values.", "present."


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--site", type=Path, help="folder with tensorrt_rtx and its libraries, if it is not installed")
    parser.add_argument("--seconds", type=float, default=110, help="for all cases together")
    parser.add_argument("--case", help="run this one here, and print its result as JSON")
    given = parser.parse_args()
    if given.site is not None:
        sys.path.insert(0, str(given.site))
    if given.case:
        print("RESULT " + json.dumps(run_case(given.folder / given.case)))
        return
    results = run_all(given)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def run_all(given: argparse.Namespace) -> dict[str, Any]:
    """Every case in a child; what went wrong stands in its place."""
    end = time.monotonic() + given.seconds
    cases: dict[str, Any] = {}
    for folder in sorted(path for path in given.folder.iterdir() if (path / "engine.json").is_file()):
        left = end - time.monotonic()
        if left < 5:
            cases[folder.name] = {"error": "no time was left"}
            continue
        command = [sys.executable, __file__, str(given.folder), "--case", folder.name]
        command += ["--site", str(given.site)] if given.site else []
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, 45), check=False)
        except subprocess.TimeoutExpired:
            cases[folder.name] = {"error": "took too long"}
            continue
        said = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if said:
            cases[folder.name] = json.loads(said[-1][len("RESULT ") :])
        else:
            log = (done.stdout + done.stderr).strip().splitlines()
            cases[folder.name] = {"error": f"exit code {done.returncode}", "log": log[-6:]}
        cases[folder.name]["seconds"] = round(time.monotonic() - start, 1)
    return {"machine": machine(), "cases": cases}


def machine() -> dict[str, Any]:
    """What it ran on, asked without loading TensorRT here."""
    try:
        import torch

        found = torch.cuda.get_device_properties(0)
        capability = f"{found.major}.{found.minor}"
        return {
            "gpu": found.name,
            "compute_capability": capability,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        }
    except (ImportError, RuntimeError, AssertionError) as error:
        return {"error": str(error)}


def run_case(folder: Path) -> dict[str, Any]:
    """Load the engines of one case, compare and time them."""
    import torch  # first: it brings the CUDA libraries that TensorRT-RTX may ask for

    torch.cuda.set_device(0)
    import tensorrt_rtx as trt

    info = json.loads((folder / "engine.json").read_text())
    logger = Log(trt)
    start = time.monotonic()
    stages, how = load(trt, logger, folder, info)
    loaded = time.monotonic() - start
    arrays = np.load(folder / "cases.npz")
    found: dict[str, Any] = {"version": trt.__version__, "load_seconds": round(loaded, 2), "loaded": how, "points": {}}
    if "steps.logits.0" in arrays:
        found["steps"] = steps(torch, stages, arrays)
        return found
    for point in sorted({name.split("/")[0] for name in arrays.files}, key=size_of):
        feeds = {n.split("/")[2]: arrays[n] for n in arrays.files if n.startswith(f"{point}/in/")}
        wanted = {n.split("/")[2]: arrays[n] for n in arrays.files if n.startswith(f"{point}/out/")}
        try:
            found["points"][point] = measure(torch, stages, feeds, wanted)
        except Exception as error:  # one point more or less
            found["points"][point] = {"error": f"{type(error).__name__}: {error}"[:300], "log": logger.last()}
    return found


class Log:
    """Keeps what TensorRT says."""

    def __new__(cls, trt: Any) -> Any:
        class Kept(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING:
                    self.lines.append(message[:300])

            def last(self) -> list[str]:
                return self.lines[-4:]

        return Kept()


class Stage:
    """One engine with its context."""

    def __init__(self, trt: Any, engine: Any, info: dict[str, Any]) -> None:
        self.trt, self.engine, self.info, self.profile = trt, engine, info, 0
        self.context = self._context()
        sides = trt.TensorIOMode
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == sides.INPUT]
        self.outputs = [name for name in names if engine.get_tensor_mode(name) == sides.OUTPUT]

    def _context(self) -> Any:
        """Kernels for a shape are compiled when it is first seen, not some time later: so times are of them."""
        try:
            config = self.engine.create_runtime_config()
            strategy = self.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER
            made = self.engine.create_execution_context(config)
        except (AttributeError, TypeError):
            made = self.engine.create_execution_context()
        if made is None:
            raise RuntimeError("no execution context")
        return made

    def bind(self, torch: Any, values: dict[str, Any], stream: Any) -> None:
        """Bind inputs among `values`, and new outputs, which join them."""
        fits = [i for i, p in enumerate(self.info["profiles"]) if inside(p["shapes"], values)]
        if not fits:
            raise ValueError("outside of every profile")
        if fits[-1] != self.profile:
            self.context.set_optimization_profile_async(fits[-1], stream.cuda_stream)
            stream.synchronize()
            self.profile = fits[-1]
        for name in self.inputs:
            value = values[name]
            self.context.set_input_shape(name, tuple(value.shape))
            self.context.set_tensor_address(name, value.data_ptr() or self._somewhere(torch))
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            values[name] = torch.empty(shape, dtype=torch_type(torch, self.trt, self.engine, name), device="cuda")
            self.context.set_tensor_address(name, values[name].data_ptr() or self._somewhere(torch))

    def _somewhere(self, torch: Any) -> int:
        """An address for a tensor without elements."""
        self._room = torch.zeros(64, device="cuda")
        return int(self._room.data_ptr())

    def launch(self, stream: Any) -> None:
        if not self.context.execute_async_v3(stream):
            raise RuntimeError("the engine did not run")


def load(trt: Any, logger: Any, folder: Path, info: dict[str, Any]) -> tuple[list[Stage], str]:
    """The engines as they came; or built here of the graph beside them, where this GPU does not take them."""
    runtime = trt.Runtime(logger)
    try:
        stages = []
        for each in info["engines"]:
            engine = runtime.deserialize_cuda_engine((folder / each["file"]).read_bytes())
            if engine is None:
                raise RuntimeError("; ".join(logger.last()) or "not loaded")
            stages.append(Stage(trt, engine, each))
        return stages, "as built elsewhere"
    except RuntimeError as error:
        graph = folder / "model.onnx"
        if not graph.is_file():
            raise
        start = time.monotonic()
        engine = runtime.deserialize_cuda_engine(build_here(trt, logger, graph, info["engines"][0]))
        if engine is None:
            raise RuntimeError(f"{error}; built here: " + "; ".join(logger.last())) from error
        how = f"built here in {time.monotonic() - start:.1f} s, since: {error}"
        return [Stage(trt, engine, info["engines"][0])], how[:400]


def build_here(trt: Any, logger: Any, graph: Path, info: dict[str, Any]) -> Any:
    """An engine for the GPU of this machine alone."""
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise RuntimeError("the parser refused the graph")
    config = builder.create_builder_config()
    for each in info["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, opt, high) in each["shapes"].items():
            profile.set_shape(name, low, opt, high)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError("building for this GPU failed: " + "; ".join(logger.last()))
    return made


def torch_type(torch: Any, trt: Any, engine: Any, name: str) -> Any:
    types = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}
    return (types | {"INT64": torch.int64, "BOOL": torch.bool})[engine.get_tensor_dtype(name).name]


def inside(shapes: dict[str, Any], values: dict[str, Any]) -> bool:
    for name, (low, _, high) in shapes.items():
        if not all(a <= n <= b for a, n, b in zip(low, values[name].shape, high, strict=True)):
            return False
    return True


def size_of(point: str) -> tuple[int, ...]:
    return tuple(int(part) for part in point.split("x") if part.isdigit())


def measure(torch: Any, stages: list[Stage], feeds: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Errors of the outputs, relative to the largest of each; and milliseconds of one run."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        values = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        for stage in stages:
            stage.bind(torch, values, stream)

        def run() -> None:
            for stage in stages:
                stage.launch(torch.cuda.current_stream().cuda_stream)

        for _ in range(WARM):
            run()
        stream.synchronize()
        errors = {}
        for name, want in wanted.items():
            got = values[name].float().cpu().numpy()[::ROWS, ::TOKENS]
            errors[name] = float(np.abs(got - want).max() / np.abs(want).max()) if np.isfinite(got).all() else None
        replay, captured = run, "launches"
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            replay, captured = graph.replay, "CUDA graph"
        except Exception as error:  # whatever cannot be captured
            captured = f"launches ({type(error).__name__}: {error})"[:160]
            torch.cuda.synchronize()
        return {"error": errors, "ms": timed(torch, stream, replay), "timed": captured}


def timed(torch: Any, stream: Any, run: Any) -> float:
    for _ in range(WARM):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for before, after in pairs:
        before.record(stream)
        run()
        after.record(stream)
    stream.synchronize()
    return round(float(np.median([before.elapsed_time(after) for before, after in pairs])), 4)


def steps(torch: Any, stages: list[Stage], arrays: Any) -> dict[str, Any]:
    """A decoder goes on from its cache, which stays on the GPU: errors of the logits of each step, and its time."""
    stream = torch.cuda.Stream()
    errors, times = [], []
    with torch.cuda.stream(stream):
        past = {n.split("/")[1]: torch.from_numpy(arrays[n]).cuda() for n in arrays.files if n.startswith("past/")}
        count = sum(name.startswith("steps.logits.") for name in arrays.files)
        for step in range(count):
            values = {
                n.split("/")[1]: torch.from_numpy(arrays[n]).cuda()
                for n in arrays.files
                if n.startswith(f"step.{step}/")
            }
            values |= past
            start = time.monotonic()
            for stage in stages:
                stage.bind(torch, values, stream)
                stage.launch(stream.cuda_stream)
            stream.synchronize()
            times.append(round(1000 * (time.monotonic() - start), 2))
            past = {name: values[PRESENT + name[len(PAST) :]] for name in past}
            want, real = arrays[f"steps.logits.{step}"], arrays[f"steps.real.{step}"]
            got = values["logits"].float().cpu().numpy()
            errors.append(float(np.abs(got[real] - want[real]).max() / np.abs(want[real]).max()))
    return {"errors": errors, "ms": times}


def table(results: dict[str, Any]) -> str:
    """The results for reading."""
    lines = [str(results["machine"])]
    for name, case in results["cases"].items():
        if "error" in case:
            lines.append(f"{name:24} {case['error']} {' | '.join(case.get('log', []))[-300:]}")
        elif "steps" in case:
            worst = max(case["steps"]["errors"])
            lines.append(f"{name:24} steps: worst error {worst:.1e}, ms {case['steps']['ms']} ({case['loaded'][:60]})")
        else:
            said = []
            for point, got in case["points"].items():
                bad = not isinstance(got["error"], dict)
                worst = (
                    got["error"] if bad else max((e if e is not None else float("nan")) for e in got["error"].values())
                )
                said.append(f"{point}: {worst}" if bad else f"{point}: {got['ms']} ms ({worst:.0e})")
            lines.append(f"{name:24} " + ", ".join(said) + f" [{case['loaded'][:40]}]")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
