"""FFNs that learn to do with few neurons: python benchmarks/topk_training.py --json

Two small models of stories, both really trained: the SwiGLU LLaMA of llama2.c (stories260K), and a ReLU model of the
OPT family, trained here on the same texts and tokens. Each is judged with the top-k of its neurons in the forward pass,
fine-tuned to a density by `trimtab train --method topk`, judged again, and compiled. Perplexity is per token, on texts
that nothing was trained or fitted on; "own top-k" is the fine-tuned model in torch with its exact top-k, "engine" what
was compiled of it, where a predictor chooses k' > k neurons and the k best of those are kept, on the same texts.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedModel

from trimtab.compiler import compile_model
from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.checks.decoded import as_decoded
from trimtab.compiler.checks.perplexity import measure_perplexity
from trimtab.compiler.data import batches, read_data
from trimtab.compiler.profile_cache import measured_profile
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.export import load_model
from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy
from trimtab.training.run import train
from trimtab.training.topk.find import down_projections
from trimtab.training.topk.finetune import RECORD
from trimtab.training.topk.settings import Settings
from trimtab.training.topk.sparse import SparseFFNs

HERE = Path(__file__).resolve().parent
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
TOKENS = 256  # of a training block, and where texts are cut that are judged
JUDGED = 200  # texts
RECALL = 0.98
PREDICTORS: list[dict[str, Any]] = [
    *({"predictor": "low-rank", "rank": rank} for rank in (8, 16, 32)),
    *({"predictor": "copy", "form": form} for form in ("int8", "int4")),
]
RELU = {"hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 5, "num_attention_heads": 8, "word_embed_proj_dim": 64}


def main(
    shared: Annotated[Path, typer.Option(help="Folder with data/llama2c and data/tinystories.")] = HERE.parents[1]
    / "shared",
    steps: Annotated[int, typer.Option(min=1, help="Of each fine-tuning; thrice as many from random weights.")] = 400,
    density: Annotated[list[float] | None, typer.Option(help="Densities to learn; by default 0.1.")] = None,
    models: Annotated[Path | None, typer.Option(help="Keep the trained models there, and take those it has.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON there, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Fine-tune, judge, compile and judge again."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(shared / "data" / "tinystories", folder)
        found = {
            name: measure(make(shared, folder, steps), folder, steps, density or [0.1])
            for name, make in (("stories260K (SwiGLU)", stories260k), ("OPT (ReLU)", relu_model))
        }
    result = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "minutes": round((time.monotonic() - start) / 60, 1), "threads": torch.get_num_threads(),
        "versions": package_versions(), "models": found,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else table(found))


def write_texts(source: Path, folder: Path) -> None:
    """Stories to learn from, one per line; and paragraphs to judge by."""
    learn: list[str] = []
    for part in ("train-v1.txt.gz", "train-v2.txt.gz"):
        whole = gzip.decompress((source / part).read_bytes()).decode()
        learn += re.split(r"(?<!\n)\n(?!\n)", whole)  # a single line break ends a story, two a paragraph
    valid = gzip.decompress((source / "valid.txt.gz").read_bytes()).decode()
    stories = re.split(r"\n+(?=Once upon a time|One day)", valid)[1:]
    for name, texts in (("train", learn), ("valid", stories)):
        kept = [text.replace("\n\n", "\n") for text in texts if len(text) > 200]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def stories260k(shared: Path, folder: Path, steps: int) -> Path:
    files = [shared / "data" / "llama2c" / name for name in ("stories260K.bin", "tok512.bin")]
    command = [sys.executable, HERE.parent / "examples" / "language-model" / "llama2c.py", *files, folder / "llama"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "llama"


def relu_model(shared: Path, folder: Path, steps: int) -> Path:
    """A ReLU model trained from random weights: the top-k of all neurons is the dense model."""
    if (folder / "relu").exists():
        return folder / "relu"
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512, max_position_embeddings=512, dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0, **RELU
    )
    OPTForCausalLM(config).save_pretrained(folder / "random")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(folder / "random")
    settings = Settings(minutes=600, steps=3 * steps, lr=3e-3, batch_size=16, max_tokens=TOKENS)
    plan = _recipe(density=1)
    train("topk", folder / "random", folder / "train.jsonl", folder / "relu", recipe=plan, settings=settings)
    return folder / "relu"


def measure(dense: Path, folder: Path, steps: int, densities: list[float]) -> dict[str, Any]:
    """Perplexities of the dense model at every density, and of what is fine-tuned from it."""
    found: dict[str, Any] = {"untrained": curve(dense, folder), "fine_tuned": []}
    for density in densities:
        out = folder / f"{dense.name}-{density:g}"
        settings = Settings(minutes=600, steps=steps, batch_size=16, max_tokens=TOKENS)
        if not out.exists():
            train("topk", dense, folder / "train.jsonl", out, recipe=_recipe(density=density), settings=settings)
        found["fine_tuned"].append(
            {
                "density": density,
                "steps": json.loads((out / RECORD).read_text())["steps"],
                "perplexity": curve(out, folder),
            }
            | compiled(out, folder, density)
        )
    return found


def curve(model: Path, folder: Path) -> dict[str, float]:
    """Perplexity in torch with the exact top-k of the neurons, by density."""
    judged = _judged(model, folder)
    module, ffns = _sparse(model)
    found = {}
    for density in DENSITIES:
        ffns.density = density
        run = _torch_run(module)
        found[str(density)] = round(measure_perplexity(judged, run, run).dense, 4)
    return found


def compiled(model: Path, folder: Path, density: float) -> dict[str, Any]:
    """What every predictor recalls and costs; perplexity of the cheapest one's engine beside the own top-k form."""
    source, data = open_source(model), read_data(folder / "train.jsonl")
    calibration = load_recipe({"calibration": {"samples": 1024, "max_tokens": TOKENS, "states": 8192}}).calibration
    profile, rows = measured_profile(source, data, calibration), []
    gated = find_anatomy(source.graph()).ffns[0].gated
    for signal, predictor in product(("gate", "both") if gated else ("gate",), PREDICTORS):
        named = {"signal": signal} | predictor
        options = {"density": density, "recall": RECALL, "most": 1.0, "exact": True} | named
        layers = run_passes(source.graph(), _recipe(**options).passes, PassContext(profile))[0].details["layers"]
        dense = sum(row["dense_bytes"] for row in layers)
        rows.append(named | {
            "recall": round(float(np.mean([row["recall"] for row in layers])), 4),
            "computed": round(float(np.mean([row["density"] for row in layers])), 4),
            "predictor_bytes": round(sum(row["predictor_bytes"] for row in layers) / dense, 4),
            "read_bytes": round(sum(row["read_bytes"] for row in layers) / dense, 4),
        })  # fmt: skip
    best = min((row for row in rows if row["recall"] >= RECALL), key=lambda row: row["read_bytes"])
    chosen = {key: best[key] for key in ("signal", "predictor", "rank", "form") if key in best}
    options = {"density": density, "recall": RECALL, "most": 1.0, "exact": True} | chosen
    plan = {
        "passes": [{"ffn-topk": options}], "check": False,
        "workload": {"batch": [1, 1, 8], "tokens": [1, 1, TOKENS], "past": [0, 0, TOKENS]},
    }  # fmt: skip
    build = compile_model(source, plan, folder / f"build-{model.name}", profile=profile)
    engine = as_decoded(build)
    assert engine is not None
    module, ffns = _sparse(model)
    ffns.density = density
    judged = measure_perplexity(_judged(model, folder), _torch_run(module), engine)
    return {
        "predictors": rows, "chosen": best, "own_top_k": round(judged.dense, 4), "engine": round(judged.compiled, 4),
        "engine_over_own": round(judged.compiled / judged.dense, 4), "agreement": round(judged.agreement, 4),
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = []
    for name, model in found.items():
        lines.append(f"{name}: perplexity at density " + ", ".join(DENSITIES_SHOWN))
        lines.append("  untrained      " + "  ".join(f"{v:8.3f}" for v in model["untrained"].values()))
        for row in model["fine_tuned"]:
            lines.append(
                f"  tuned to {row['density']:<5} " + "  ".join(f"{v:8.3f}" for v in row["perplexity"].values())
            )
            best = row["chosen"]
            how = f"{best['predictor']} {best.get('rank', best.get('form'))} on {best['signal']}"
            lines.append(
                f"    compiled: {best['computed']:.1%} computed, recall {best['recall']:.1%} by {how}, "
                f"{best['read_bytes']:.1%} of the bytes; perplexity {row['engine']:.3f}, its own top-k "
                f"{row['own_top_k']:.3f}"
            )
    return "\n".join(lines)


DENSITIES_SHOWN = [f"{density:g}" for density in DENSITIES]


def _recipe(**options: Any) -> Any:
    return load_recipe({"passes": [{"ffn-topk": options}]})


def _sparse(model: Path) -> tuple[PreTrainedModel, SparseFFNs]:
    architecture = json.loads((model / "config.json").read_text())["architectures"][0]
    module = load_model(model, architecture)
    return module, SparseFFNs(down_projections(module, find_anatomy(open_source(model).graph()).ffns))


def _torch_run(module: PreTrainedModel) -> Any:
    def run(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(feed[name]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return {"logits": module(**given).logits.numpy()}

    return run


def _judged(model: Path, folder: Path) -> list[dict[str, np.ndarray]]:
    source = open_source(model)
    found = batches(read_data(folder / "valid.jsonl"), source, 8, TOKENS, JUDGED, inputs=source.graph().inputs)
    return list(found)


if __name__ == "__main__":
    typer.run(main)
