"""What `trimtab package` writes, in the hands of the program that it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from clear import clear_prompts
from typer.testing import CliRunner

from trimtab.compiler import compile_model, load
from trimtab.compiler.cli.app import app
from trimtab.compiler.generation import generate

WORKLOAD = {"batch": [1, 1, 4], "tokens": [1, 8, 32]}
SPARSE = {"ffn-topk": {"density": 0.1, "take": 0.2, "rank": 8, "dense_above": 1}}


def cli(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(" ".join(f"w{i}" for i in rng.integers(4, 100, 12)) for _ in range(30)))
    return path


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("passes", [[], [SPARSE]], ids=["dense", "sparse"])
def test_genai_generates_the_same_tokens(family: str, passes: list[Any], texts: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = zoo.save_pretrained(family, tmp_path / "model")
    recipe = {"passes": passes, "workload": WORKLOAD, "threads": 1}
    build = compile_model(source, recipe, tmp_path / "build", data=texts if passes else None)
    done = cli("package", build.path, "--genai", tmp_path / "genai")
    assert done.exit_code == 0, done.stderr
    ours_alone = bool(passes) or family in ("llama", "gemma")  # whose gates are an op of the dialect, too
    assert (tmp_path / "genai" / "trimtab_ops.so").is_file() == ours_alone
    seed = int(np.random.default_rng().integers(2**31))
    print("seed", seed)
    engine, rng, ours = load(build.path), np.random.default_rng(seed), [0]
    while len(ours) < 2:  # some prompts are answered by the end alone
        (prompt,) = clear_prompts(engine.runner, [7], 20, (4, 100), rng)
        ours = [
            int(token)
            for (token,) in generate(engine.runner, [prompt], max_new_tokens=20, stop=engine.tokenizer.end_ids)
        ]
    model = genai.Model(str(tmp_path / "genai"))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=27, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = generator.get_sequence(0).tolist()[len(prompt) :]
    # ONNX Runtime GenAI ends at the same token, and does not add it to its sequence.
    assert theirs == (ours[:-1] if ours[-1] in engine.tokenizer.end_ids else ours)


def test_what_is_no_language_model_is_refused(tmp_path: Path) -> None:
    source = zoo.save_pretrained("bert", tmp_path / "model")
    build = compile_model(source, {"passes": [], "threads": 1}, tmp_path / "build")
    done = cli("package", build.path, "--genai", tmp_path / "genai")
    assert done.exit_code == 1 and "no cache" in done.stderr
    assert not (tmp_path / "genai").exists()


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    source = zoo.save_pretrained("llama", tmp_path / "model")
    build = compile_model(source, {"passes": [], "workload": WORKLOAD, "threads": 1}, tmp_path / "build")
    (tmp_path / "genai").mkdir()
    done = cli("package", build.path, "--genai", tmp_path / "genai")
    assert done.exit_code == 1 and "exists already" in done.stderr
    done = cli("package", build.path, "--genai", tmp_path / "new" / "genai", "--json")
    assert json.loads(done.stdout) == {"genai": str(tmp_path / "new" / "genai")}
    config = json.loads((tmp_path / "new" / "genai" / "genai_config.json").read_text())
    assert config["model"]["context_length"] == zoo.TEXT and config["model"]["decoder"]["num_key_value_heads"] == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["genai"]
