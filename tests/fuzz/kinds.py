"""One case of each kind: damage a sound input at random, and use it as a user would."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import subjects
import yaml
from mutate import damage_bytes, damage_message, damage_value, rewire
from safetensors.numpy import save_file

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.build import open_build
from trimtab.compiler.calibrate import calibrate
from trimtab.compiler.checks.validate import validate
from trimtab.compiler.data import read_data
from trimtab.compiler.recipe import load_recipe
from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.checkpoint import read_checkpoint

Case = Callable[[np.random.Generator, Path], Any]
"""Makes the damaged input in a folder of its own, and uses it."""

ROOT = Path(__file__).resolve().parents[2]


def _pick(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _times(rng: np.random.Generator) -> range:
    """How often an input is damaged: mostly once."""
    return range(int(rng.choice([1, 1, 1, 2, 4])))


# ------------------------------------------------------------------ ONNX
def onnx_file(rng: np.random.Generator, folder: Path) -> object:
    """A damaged ONNX file, compiled by one of several recipes."""
    model, external = _pick(rng, [subjects.encoder, subjects.decoder])(rng), bool(rng.integers(4) == 0)
    if rng.integers(2):
        for _ in _times(rng):
            rewire(model, rng)
        path = folder / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return _compile(rng, path, folder)
    path = subjects.save(model, folder / "model.onnx", external=external)
    if rng.integers(8) == 0:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    else:
        proto = onnx.load(str(path), load_external_data=False)
        for _ in _times(rng):
            damage_message(proto, rng)
        path.write_bytes(proto.SerializeToString())
    return _compile(rng, path, folder)


def _compile(rng: np.random.Generator, path: Path, folder: Path) -> object:
    np.savez(folder / "data.npz", input_ids=subjects.ids(rng))
    recipe = {"passes": _pick(rng, subjects.RECIPES), **subjects.SIZES}
    if rng.integers(2):
        recipe["workload"] = recipe["workload"] | {"past": [0, 2, 4]}
    build = compile_model(path, recipe, folder / "build", data=folder / "data.npz")
    if rng.integers(4) == 0:
        validate(build)
    return load(build.path, threads=1).run({"input_ids": subjects.ids(rng, 2, 5)})


# ------------------------------------------------------------------ recipes
def recipe(rng: np.random.Generator, folder: Path) -> object:
    """A recipe damaged as text or as values; those that can be read are compiled."""
    value = yaml.safe_load(_pick(rng, _recipes()))
    for _ in _times(rng):
        value = damage_value(value, rng)
    text = yaml.safe_dump(value, allow_unicode=True)
    if rng.integers(2):
        text = damage_bytes(text.encode(), rng).decode("utf-8", "replace") if rng.integers(2) else _spliced(text, rng)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    read = load_recipe(folder / "recipe.yaml")
    if read.target != "onnxruntime" or read.shards > 1 or rng.integers(3):
        return read
    model = subjects.save(subjects.encoder(rng), folder / "model.onnx")
    np.savez(folder / "data.npz", input_ids=subjects.ids(rng))
    return compile_model(model, folder / "recipe.yaml", folder / "build", data=folder / "data.npz")


@cache
def _recipes() -> list[str]:
    stored = [path.read_text() for path in sorted((ROOT / "examples").rglob("*.yaml"))]
    return stored + [yaml.safe_dump({"passes": passes, **subjects.SIZES}) for passes in subjects.RECIPES]


def _spliced(text: str, rng: np.random.Generator) -> str:
    """Put a piece of YAML's syntax somewhere."""
    pieces = [
        "&a ",
        "*a",
        "!!int ",
        "!!map ",
        "? ",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        "|\n",
        "'",
        '"',
        "#",
        "---\n",
        "\t",
    ]
    at = int(rng.integers(len(text) + 1))
    return text[:at] + _pick(rng, [*pieces, "2001-02-30", "0x", "1_0", "~", ".nan", "<<: "]) + text[at:]


# ------------------------------------------------------------------ Profiles
def profile(rng: np.random.Generator, folder: Path) -> object:
    """A Profile with damaged tensors, metadata or bytes, compiled with."""
    model = subjects.save(subjects.encoder(rng), folder / "model.onnx")
    np.savez(folder / "data.npz", input_ids=subjects.ids(rng))
    measured = calibrate(open_source(model), read_data(folder / "data.npz"), samples=16, states=64)
    tensors, info = dict(measured.tensors), json.loads(measured.info.model_dump_json())
    _add_learned(tensors, rng)
    how = rng.integers(8)
    if how < 6:
        for _ in _times(rng):
            _damage_tensor(tensors, rng)
    elif how == 6:
        info = damage_value(info, rng)
    path = folder / "profile.safetensors"
    save_file(tensors, path, metadata={"trimtab": json.dumps(info)})
    if how == 7:
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    learned = [["unpad", "token-prune"], [{"ffn-route": {"most": 1.0}}], ["early-exit"], ["recover"]]
    passes = _pick(rng, [p for p in subjects.RECIPES if p] + learned)
    recipe = {"passes": passes, **subjects.SIZES, "check": False}
    return compile_model(model, recipe, folder / "build", profile=path)


def _add_learned(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """What trainings have learned: routers, thresholds, exits."""
    for layer in range(2):
        tensors[f"learned.lte.router.{layer}.weight"] = rng.normal(size=(subjects.WIDTH, 4)).astype(np.float32)
        tensors[f"learned.lte.router.{layer}.bias"] = np.zeros(4, np.float32)
        tensors[f"learned.lte.router.{layer}.groups"] = np.arange(subjects.NEURONS).reshape(4, -1) % 4
    tensors["learned.lte.threshold"] = np.array(0.5)
    tensors["learned.magic-pyramid.thresholds"] = rng.random(2) * 0.01
    for name, shape in (("weight", (subjects.WIDTH, subjects.CLASSES)), ("bias", (subjects.CLASSES,))):
        tensors[f"learned.magic-pyramid.exit.0.{name}"] = rng.normal(size=shape).astype(np.float32)
    tensors["learned.recover.w3"] = rng.normal(size=(4, 4)).astype(np.float32)


def _damage_tensor(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    name = _pick(rng, sorted(tensors))
    value = tensors[name]
    changes: list[Callable[[], np.ndarray | None]] = [
        lambda: None,
        lambda: value.reshape(-1),
        lambda: value[None],
        lambda: np.asarray(value.sum()),
        lambda: value[:-1] if value.ndim else value,
        lambda: value[..., :-1] if value.ndim else value,
        lambda: value[:0] if value.ndim else value,
        lambda: value.astype(_pick(rng, [np.int8, np.float16, np.float64, np.bool_, np.complex64, np.uint8])),
        lambda: -value if value.dtype != bool else value,
        lambda: np.zeros_like(value),
        lambda: np.full_like(value, np.nan if value.dtype.kind == "f" else 99),
        lambda: np.full_like(value, 1e30 if value.dtype.kind == "f" and value.itemsize > 2 else 100),
        lambda: np.asarray(value).T.copy(),
    ]
    changed = _pick(rng, changes)()
    del tensors[name]
    if changed is not None:
        tensors[name if rng.integers(6) else name + "x"] = np.ascontiguousarray(changed)


# ------------------------------------------------------------------ data
def data(rng: np.random.Generator, folder: Path) -> object:
    """A damaged data file, calibrated on or validated with."""
    build = _served(folder.parent)
    name, content = _pick(rng, _files())
    if name.endswith(".npz") and rng.integers(2):
        content = _archive(rng)
    else:
        for _ in _times(rng):
            content = damage_bytes(content, rng)
        if name.endswith(".jsonl") and rng.integers(2):
            rows = [damage_value(row, rng) for row in ROWS]
            content = "\n".join(json.dumps(row) for row in rows).encode()
        if rng.integers(5) == 0 and not name.endswith(".npz"):
            name, content = name + ".gz", gzip.compress(content)
            content = damage_bytes(content, rng) if rng.integers(2) else content
    path = folder / name
    path.write_bytes(content)
    if rng.integers(2):
        return calibrate(open_source(build.parent / "source"), read_data(path), samples=8, states=32)
    return validate(open_build(build), data=path, samples=8)


ROWS: list[Any] = [
    {"text": "w1 w2 w3", "label": 1}, {"text": "w4", "label": 0}, {"text": "w5 w6", "text_pair": "w7", "label": 2},
]  # fmt: skip


@cache
def _files() -> list[tuple[str, bytes]]:
    lines = "\n".join(json.dumps(row) for row in ROWS[:2] * 4)
    return [
        ("d.txt", b"w1 w2 w3\nw4 w5\nw6\n" * 4),
        ("d.jsonl", lines.encode()),
        ("d.tsv", b"text\tlabel\nw1 w2\t0\nw3\t1\nw4 w5\t2\n" * 3),
        ("d.npz", _npz(input_ids=np.arange(2, 26).reshape(4, 6), labels=np.array([0, 1, 2, 0]))),
    ]


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _archive(rng: np.random.Generator) -> bytes:
    """An archive of odd members, or of arrays of odd types and shapes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("input_ids", "labels", "attention_mask", "extra")[: int(rng.integers(1, 5))]:
            shape = _pick(rng, [(4, 6), (4,), (0, 6), (4, 0), (4, 6, 1), (), (3, 6)])
            kind = _pick(rng, [np.int64, np.int32, np.float32, np.bool_, np.uint64, np.complex64, "U3"])
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ones(shape, np.int64).astype(kind))
            content = member.getvalue()
            content = damage_bytes(content, rng) if rng.integers(4) == 0 else content
            archive.writestr(_pick(rng, [f"{name}.npy", f"{name}.npy", name, f"{name}.txt"]), content)
    return file.getvalue()


# ------------------------------------------------------------------ builds
def manifest(rng: np.random.Generator, folder: Path) -> object:
    """A build with a damaged manifest whose hash is right, loaded and run."""
    build = folder / "build"
    shutil.copytree(_served(folder.parent), build)
    value = json.loads((build / "manifest.json").read_text())
    for _ in _times(rng):
        value = damage_value(value, rng)
    text = json.dumps(value)
    if rng.integers(10) == 0:
        text = damage_bytes(text.encode(), rng).decode("latin-1")
    (build / "manifest.json").write_text(text, encoding="utf-8")
    digest = hashlib.sha256((build / "manifest.json").read_bytes()).hexdigest()
    (build / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    engine = load(build, threads=1)
    outputs = engine.run(engine.tokenize(["w1 w2", "w3"]))
    if rng.integers(4) == 0:
        validate(open_build(build))
    return outputs


def _served(root: Path) -> Path:
    """A sound build with a tokenizer; made once in `root`, with its source beside it."""
    build = root / "sound"
    if not build.exists():
        source = root / "source"
        subjects.save(subjects.encoder(np.random.default_rng(0)), source / "model.onnx")
        subjects.tokenizer(source)
        compile_model(source, {"passes": [], **subjects.SIZES}, build)
    return build


# ------------------------------------------------------------------ Hugging Face folders
CONFIG: dict[str, Any] = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 16, "vocab_size": 40,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16,
    "id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}, "problem_type": None,
}  # fmt: skip
MODULES: list[Any] = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def folder_of_a_checkpoint(rng: np.random.Generator, folder: Path) -> object:
    """A Hugging Face folder with a damaged JSON file or damaged weights, read up to its export."""
    files: dict[str, Any] = {
        "config.json": CONFIG,
        "tokenizer_config.json": {"model_max_length": 16, "tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"},
        "model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model.safetensors"}},
    }
    if rng.integers(2):
        files |= {
            "modules.json": MODULES,
            "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True},
        }
        files["sentence_bert_config.json"] = {"max_seq_length": 16, "do_lower_case": False}
    damaged = _pick(rng, sorted(files))
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        for _ in _times(rng) if name == damaged else ():
            value = damage_value(value, rng)
        (folder / name).write_text(json.dumps(value))
    if rng.integers(6) == 0:
        (folder / damaged).write_bytes(damage_bytes((folder / damaged).read_bytes(), rng))
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    if rng.integers(6) == 0:
        path = folder / "model.safetensors"
        path.write_bytes(damage_bytes(path.read_bytes(), rng))
    return read_checkpoint(folder)


KINDS: dict[str, Case] = {
    "onnx": onnx_file, "recipe": recipe, "profile": profile, "data": data, "manifest": manifest,
    "checkpoint": folder_of_a_checkpoint,
}  # fmt: skip
