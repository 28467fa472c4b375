"""What a low-rank map wins in place of neurons that are left out: python benchmarks/rest.py MODEL TRAIN VALID --json

A SwiGLU language model as it is, without training: `ffn-topk` computes a share of each FFN's neurons, those that a
low-rank predictor of the gate chooses, and `rest` stands for the others. Predictors and maps are fitted by the pass
itself on calibration states; perplexity is computed in torch, with what they choose and add, on texts that nothing was
fitted on. Bytes are those of predictor and map beside the dense FFN's, in fp32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trimtab.compiler.builds.manifest import package_versions
from trimtab.compiler.data import read_data
from trimtab.compiler.profile_cache import measured_profile
from trimtab.compiler.recipe import Calibration
from trimtab.compiler.sources import open_source
from trimtab.passes.anatomy import FFN, find_anatomy
from trimtab.passes.ffn_topk.choice import Choice
from trimtab.passes.ffn_topk.topk import FFNTopK
from trimtab.passes.matrices.forms import LowRank
from trimtab.passes.profile import Profile
from trimtab.passes.sampled_ffn import sample_ffn
from trimtab.passes.sparse_ffn import Rest, fit_rest

DENSITIES = (0.5, 0.25)
PAIRS = ((64, 0), (64, 16), (64, 64), (64, 128), (128, 0), (32, 0), (32, 58))
"""Ranks of the predictor and of the map, 0 for none. (32, 58) has the bytes of (64, 0) where d_ff is 8/3 d_model."""


@dataclass
class Variant:
    """A setting, and what was fitted for it, layer by layer."""

    density: float
    predictor: int
    rest: int
    choices: list[Choice]
    rests: list[Rest | None]
    errors: list[float]

    def report(self, dense_bytes: int) -> dict[str, Any]:
        found = [rest for rest in self.rests if rest is not None]
        nbytes = sum(choice.predictor.nbytes for choice in self.choices) + sum(rest.nbytes for rest in found)
        return {
            "density": self.density, "predictor": self.predictor, "rest": self.rest,
            "bytes": round(nbytes / dense_bytes, 4), "recall": _mean([choice.recall for choice in self.choices]),
            "error": _mean(self.errors),
        }  # fmt: skip


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a LlamaForCausalLM.")],
    train: Annotated[Path, typer.Argument(help="Texts to calibrate on (.jsonl).")],
    valid: Annotated[Path, typer.Argument(help="Texts to judge by (.jsonl).")],
    samples: Annotated[int, typer.Option(min=1, help="Texts of 128 tokens to calibrate on.")] = 40,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens to judge by, in blocks of 256.")] = 2816,
    density: Annotated[list[float] | None, typer.Option(help="By default 0.5 and 0.25.")] = None,
    layers: Annotated[list[int] | None, typer.Option(help="Their errors alone; perplexity needs all.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A Profile of the model, instead of measuring one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON there, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False,
) -> None:
    """Fit, and judge each setting."""
    source = open_source(model)
    calibration = Calibration(samples=samples, batch_size=4)
    known = Profile.load(profile) if profile is not None else measured_profile(source, read_data(train), calibration)
    ffns = find_anatomy(source.graph()).ffns
    some = [ffn for ffn in ffns if layers is None or ffn.layer in layers]
    variants, dense_bytes = fit(some, known, density or list(DENSITIES)), 4 * sum(ffn.params for ffn in some)
    rows = [variant.report(dense_bytes) for variant in variants]
    result = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "calibration_tokens": known.info.tokens, "versions": package_versions(), "rows": rows,
    }  # fmt: skip
    if len(some) == len(ffns):
        module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        blocks = _blocks(model, valid, tokens // 256)
        result |= {"tokens": blocks.numel(), "dense": round(perplexity(module, blocks), 3)}
        for variant, row in zip(variants, rows, strict=True):
            with sparse(module, variant):
                row["perplexity"] = round(perplexity(module, blocks), 3)
            print(row, file=sys.stderr, flush=True)
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else table(result))


def fit(ffns: Sequence[FFN], profile: Profile, densities: Sequence[float]) -> list[Variant]:
    """All settings, fitted layer by layer, since the activations of one layer serve all of them."""
    variants = [Variant(density, *pair, [], [], []) for density in densities for pair in PAIRS]
    for number, ffn in enumerate(ffns, 1):
        start, layer, choices = time.monotonic(), sample_ffn(ffn, profile), dict[tuple[float, int], Choice]()
        for variant in variants:
            key = variant.density, variant.predictor
            if key not in choices:
                step = FFNTopK(density=variant.density, take=variant.density, rank=variant.predictor)
                choices[key] = step._choose(layer)
            rest = fit_rest(layer, choices[key].computed, variant.rest) if variant.rest else None
            variant.choices.append(choices[key])
            variant.rests.append(rest)
            h = layer.h_held_out * choices[key].computed(layer.held_out)
            variant.errors.append(layer.error(h @ layer.down) if rest is None else rest.error)
        print(f"fitted layer {number} of {len(ffns)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        for choice in choices.values():
            choice.predictor.layer = None  # its activations are hundreds of megabytes
    return variants


@contextmanager
def sparse(module: PreTrainedModel, variant: Variant) -> Iterator[None]:
    """Let the FFNs of `module` leave out what `variant` does."""
    ffns = [layer.mlp for layer in module.model.layers]
    for mlp, choice, rest in zip(ffns, variant.choices, variant.rests, strict=True):
        mlp.forward = _sparse_forward(mlp, choice, rest)
    try:
        yield
    finally:
        for mlp in ffns:
            del mlp.forward  # the class's own is back


def _sparse_forward(mlp: Any, choice: Choice, rest: Rest | None) -> Callable[[torch.Tensor], torch.Tensor]:
    (guess,) = choice.predictor.guesses
    assert isinstance(guess.weight, LowRank) and guess.bias is None
    arrays = guess.weight.left.array, guess.weight.right.array, choice.predictor.weight
    left, right, weight = (torch.from_numpy(array) for array in arrays)
    share = 1 - choice.take / len(weight)

    def forward(x: torch.Tensor) -> torch.Tensor:
        scores = mlp.act_fn(x @ left @ right).abs() * weight
        mask = torch.zeros_like(scores).scatter_(-1, scores.topk(choice.take, dim=-1).indices, 1)
        y: torch.Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) * mask)
        if rest is None:
            return y
        a, b, c = (torch.from_numpy(part) for part in (rest.left, rest.right, rest.shift))
        return y + share * (x @ a @ b + c)

    return forward


@torch.no_grad()
def perplexity(module: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Of the tokens behind the first of each block, [blocks, tokens]; products in bfloat16, alike for all settings."""
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for some in blocks.split(2):
            logits = module(input_ids=some, use_cache=False).logits[:, :-1].float()
            total += cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum").item()
    return float(torch.tensor(total / blocks[:, 1:].numel()).exp())


def _blocks(model: Path, texts: Path, count: int) -> torch.Tensor:
    tokenizer, ids = AutoTokenizer.from_pretrained(model), list[int]()
    for line in texts.read_text(encoding="utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"])["input_ids"]
        if len(ids) >= count * 256:
            break
    return torch.tensor(ids[: count * 256]).view(count, 256)


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def table(found: dict[str, Any]) -> str:
    dense = [f"dense: perplexity {found['dense']}"] if "dense" in found else []
    settings = (
        f"density {row['density']:.0%}, predictor of rank {row['predictor']}, rest of rank {row['rest']}: "
        f"{row['bytes']:.1%} of the bytes beside, error {row['error']:.3f}"
        + (f", perplexity {row['perplexity']}" if "perplexity" in row else "")
        for row in found["rows"]
    )
    return "\n".join([*dense, *settings])


if __name__ == "__main__":
    typer.run(main)
