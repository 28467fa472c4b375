"""GGUF files as sources: the model that llama.cpp would run, or a reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_logits
import numpy as np
import pytest
from safetensors.numpy import load_file
from seeds import seeded
from tokenizers.pre_tokenizers import ByteLevel

from trimtab.compiler import compile_model, load, open_source
from trimtab.compiler.sources import gguf as source_of_gguf
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.errors import ModelError

gguf = pytest.importorskip("gguf")
from trimtab.compiler.sources.gguf_unpack import unpack  # noqa: E402

KINDS = gguf.GGMLQuantizationType
WIDTH, NEURONS, LAYERS, HEADS, SHARED, TOKENS = 64, 96, 2, 4, 2, 270


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k of a LLaMA in the order of llama.cpp, whose rotation pairs neighbours."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def model_of(architecture: str, rng: np.random.Generator, *, tied: bool) -> Any:
    """A small LLaMA or Qwen2 of random weights, all of them different."""
    import torch
    import transformers

    sizes = {
        "hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": SHARED, "vocab_size": TOKENS, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    kind = {"llama": "Llama", "qwen2": "Qwen2"}[architecture]
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = rng.standard_normal(weight.shape) * weight.shape[-1] ** -0.5
            weight.copy_(torch.from_numpy(drawn + ("norm" in name)))
    return model


def write(
    path: Path, model: Any, architecture: str, kind: str, change: Callable[[Any], None] = lambda writer: None,
    skip: str = "",
) -> Path:  # fmt: skip
    """`model` as a GGUF file; in the model, its weights become what their type makes of them."""
    import torch

    config, form = model.config, KINDS[kind]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(NEURONS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(SHARED)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(TOKENS)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], LAYERS)
    for name, weight in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy().astype(np.float32)
        heads = {"q_proj": HEADS, "k_proj": SHARED}.get(stem.rpartition(".")[2]) if architecture == "llama" else None
        values = permuted(values, heads) if heads else values
        used = KINDS.F32 if values.ndim == 1 else form
        stored = gguf.quantize(values, used)
        if values.ndim > 1:
            rounded = np.array(gguf.dequantize(stored, used)).reshape(values.shape)
            if heads:
                order = permuted(np.arange(len(rounded))[:, None], heads)[:, 0]
                rounded[order] = rounded.copy()
            with torch.no_grad():
                weight.copy_(torch.from_numpy(rounded))
        called = f"{names.get_name(stem)}.{end}"
        if called != skip:
            writer.add_tensor(called, stored, raw_dtype=used)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any) -> None:
    """Bytes as GPT-2's tokenizers have them, and a few merges."""
    letters = sorted(ByteLevel.alphabet())
    merges = ["t h", "th e", "Ġ a"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    tokens += [f"<|{i}|>" for i in range(TOKENS - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(letters) + 3) + [3] * (TOKENS - len(letters) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(TOKENS - 2)
    writer.add_eos_token_id(TOKENS - 1)


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = model.double()(torch.from_numpy(ids)).logits.numpy()
    model.float()
    return found


@pytest.mark.parametrize(
    ("architecture", "kind", "tied"),
    [("llama", "F32", True), ("llama", "Q8_0", False), ("llama", "Q4_1", True), ("llama", "F16", False),
     ("llama", "BF16", True), ("qwen2", "Q8_0", True), ("qwen2", "Q4_0", False)],
)  # fmt: skip
def test_weights_have_the_values_that_their_types_stand_for(
    architecture: str, kind: str, tied: bool, tmp_path: Path
) -> None:
    model = model_of(architecture, seeded(), tied=tied)
    unpack(write(tmp_path / "model.gguf", model, architecture, kind), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    wanted = {name: weight.numpy() for name, weight in model.state_dict().items()}
    if tied:
        del wanted["lm_head.weight"]
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert config["tie_word_embeddings"] is tied
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.usefixtures("real_children")
def test_it_compiles_with_its_tokenizer_and_files_beside_it_are_not_read(tmp_path: Path) -> None:
    """Against transformers in float64."""
    rng = seeded()
    model = model_of("llama", rng, tied=True)
    path = write(tmp_path / "Model.GGUF", model, "llama", "Q8_0", add_tokenizer)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    source = open_source(path)
    assert source.kind == "gguf"
    assert source.origin == str(path)
    assert source.max_tokens == 128
    runner = OnnxRuntimeRunner(source.onnx)
    for batch, tokens in ((1, 1), (3, 17)):
        ids = rng.integers(0, TOKENS, (batch, tokens))
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        empty = np.zeros((batch, SHARED, 0, WIDTH // HEADS), np.float32)
        feeds |= {name: empty for name in runner.inputs if name.startswith("past")}
        wanted, found = logits(model, ids), runner.run(feeds)["logits"]
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    build = compile_model(path, {"passes": [{"weight-only": {"bits": 8}}], "check": False}, tmp_path / "build")
    ids = load(build.path).tokenizer.encode(["the other a"], 64)["input_ids"]
    assert ids.shape[1] < len("the other a")  # merged
    folder = source.tokenizer
    assert folder is not None
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == TOKENS - 1


@pytest.mark.parametrize(("kind", "rounds"), [("F32", 2e-3), ("Q8_0", 0.02), ("Q4_1", 0.02)])
def test_logits_are_as_llama_cpp_has_them(kind: str, rounds: float, tmp_path: Path) -> None:
    """Up to its own rounding: of keys and values to half precision, and of what Q8_0 and Q4_1 multiply to 8 bits."""
    model = model_of("llama", np.random.default_rng(llama_logits.SEED), tied=False)
    source = open_source(write(tmp_path / f"{kind}.gguf", model, "llama", kind, add_tokenizer))
    runner, ids = OnnxRuntimeRunner(source.onnx), np.array([llama_logits.IDS])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    empty = np.zeros((1, SHARED, 0, WIDTH // HEADS), np.float32)
    feeds |= {name: empty for name in runner.inputs if name.startswith("past")}
    found = runner.run(feeds)["logits"][0, -1]
    theirs = json.loads(Path(llama_logits.__file__).with_suffix(".json").read_text())
    assert theirs["ids"] == llama_logits.IDS
    errors = {
        other: float(np.linalg.norm(found - np.array(theirs[other])) / np.linalg.norm(theirs[other]))
        for other in ("F32", "Q8_0", "Q4_1")
    }
    print(errors)
    assert errors[kind] <= rounds
    assert all(error > 0.05 for other, error in errors.items() if "Q4_1" in (kind, other) and other != kind)


def flipped(path: Path, at: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("gguf")
    return write(folder / "model.gguf", model_of("llama", rng, tied=True), "llama", "Q8_0", add_tokenizer)


def refused(path: Path) -> ModelError:
    """Before any child begins."""
    with pytest.raises(ModelError) as raised:
        open_source(path)
    assert str(path) in raised.value.message
    return raised.value


def refused_by_child(path: Path, folder: Path) -> str:
    """What the child says, here without one."""
    with pytest.raises(ModelError) as raised:
        unpack(path, folder)
    assert not list(folder.glob("*.safetensors"))
    return raised.value.message


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"PK\3\4", "not a GGUF file"),
        (4, b"\0\0\0\3", "of the other byte order"),
        (4, b"\1\0\0\0", "GGUF of version 1"),
        (8, (1 << 20).to_bytes(8, "little"), "truncated or damaged"),
        (16, (1 << 20).to_bytes(8, "little"), "truncated or damaged"),
        (24, (1 << 20).to_bytes(8, "little"), "truncated or damaged"),
    ],
)
def test_what_is_damaged_is_refused(at: int, value: bytes, says: str, sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(sound.read_bytes())
    assert says in refused(flipped(path, at, value)).message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_what_is_truncated_is_refused(share: float, sound: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "part.gguf", sound.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    error = refused(path)
    assert "truncated" in error.message or "not a GGUF file" in error.message
    assert error.hint == "download it again"


def test_a_header_that_is_changed_anywhere_is_read_or_refused(sound: Path, tmp_path: Path) -> None:
    from trimtab.compiler.sources.gguf_header import check_tensors, read_header

    rng, data, path = seeded(), sound.read_bytes(), tmp_path / "changed.gguf"
    sizes = {int(kind): each for kind, each in gguf.GGML_QUANT_SIZES.items()}
    first = min(tensor.offset for tensor in read_header(sound).tensors)
    outcomes = set()
    for _ in range(300):
        changed = bytearray(data)
        for at in rng.integers(4, first, rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path.write_bytes(bytes(changed))
        try:
            check_tensors(read_header(path), sizes)
            outcomes.add("read")
        except ModelError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def with_factors(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, WIDTH // HEADS // 2, dtype=np.float32))


def with_ones(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.ones(WIDTH // HEADS // 2, np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_factors, "rotates positions by factors of its own"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scales positions (yarn)"),
        (lambda writer: writer.add_uint16("split.count", 3), "is one of 3 parts"),
        (lambda writer: writer.add_tensor("other", np.zeros((2, 32), np.int8)), "weights of type I8"),
    ],
)
def test_what_would_be_read_as_another_model_is_refused(
    change: Callable[[Any], None], says: str, tmp_path: Path
) -> None:
    model = model_of("llama", np.random.default_rng(0), tied=True)
    assert says in refused_by_child(write(tmp_path / "model.gguf", model, "llama", "F16", change), tmp_path)


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    model = model_of("llama", np.random.default_rng(0), tied=True)
    unpack(write(tmp_path / "model.gguf", model, "llama", "F16", with_ones), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_missing_weights_and_unknown_architectures_are_named(tmp_path: Path) -> None:
    model = model_of("llama", np.random.default_rng(0), tied=True)
    path = write(tmp_path / "model.gguf", model, "llama", "F16", skip="blk.1.ffn_up.weight")
    assert "lacks model.layers.1.mlp.up_proj.weight" in refused_by_child(path, tmp_path)
    for name, says in (("rwkv7", "reads no GGUF of architecture 'rwkv7'"), ("general", "'general'")):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert says in refused_by_child(tmp_path / f"{name}.gguf", tmp_path)


def test_a_vocabulary_alone_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    add_tokenizer(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "no weights" in refused(tmp_path / "vocab.gguf").message  # by a child


def test_without_the_package_the_extra_is_named(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    error = refused(sound)
    assert "needs gguf" in error.message and error.hint == 'pip install "trimtab[gguf]"'


def test_the_cache_makes_a_changed_file_again(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(sound.read_bytes())
    first = source_of_gguf.unpacked(path)
    assert source_of_gguf.unpacked(path) == first
    write(path, model_of("llama", np.random.default_rng(1), tied=True), "llama", "Q8_0")
    assert source_of_gguf.unpacked(path) != first
