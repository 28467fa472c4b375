"""sentence-transformers folders, saved by the library itself: its embeddings, or a refusal that names the cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file
from seeds import seeded
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from trimtab.compiler import load
from trimtab.compiler.data.preparation import Preparation, read_preparation
from trimtab.compiler.data.tokenizer import load_tokenizer
from trimtab.compiler.pipeline import compile_model
from trimtab.compiler.sources.checkpoint import read_checkpoint
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.folder import token_limit, tokenizer_folder
from trimtab.compiler.sources.pooling import load_embedding
from trimtab.compiler.sources.torch_export import export_module
from trimtab.compiler.sources.transformer import Exportable
from trimtab.passes.errors import ModelError, TrimtabError

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

WIDTH = 32
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_FAMILIES: dict[str, Any] = {
    "bert": transformers.BertConfig(vocab_size=90, **_SIZES, max_position_embeddings=40),
    "roberta": transformers.RobertaConfig(vocab_size=90, **_SIZES, max_position_embeddings=80, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=90, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40
    ),
    "t5": transformers.T5Config(vocab_size=90, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "llama": transformers.LlamaConfig(vocab_size=90, **_SIZES, max_position_embeddings=64, pad_token_id=1),
}


def _tokenizer(lower: bool = False, template: str = "<s> $A </s>") -> Any:
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(40)), *(f"W{i}" for i in range(40))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    inner.post_processor = processors.TemplateProcessing(template, None, [("<s>", 0), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>",
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def _transformer(folder: Path, family: str = "bert", head: str = "", seed: int = 0, **options: Any) -> Path:
    """A random model of `family` in `folder`, with the head that the end of its class's name says."""
    torch.manual_seed(seed)
    config = _FAMILIES[family]
    base = transformers.AutoModel._model_mapping[type(config)]
    kind = getattr(transformers, base.__name__.removesuffix("Model") + head) if head else base
    model = kind(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    _tokenizer(**options).save_pretrained(folder)
    return folder


def _saved(folder: Path, base: Path, *behind: Any, transformer: dict[str, Any] | None = None, **options: Any) -> Path:
    """A folder that the library writes, of the transformer in `base` and the modules `behind` it."""
    first = modules.Transformer(str(base), **(transformer or {}))
    library.SentenceTransformer(modules=[first, *behind], device="cpu", **options).save_pretrained(str(folder))
    return folder


def _texts(seed: int, count: int = 6) -> list[str]:
    rng = np.random.default_rng(seed)
    words = [f"{letter}{i}" for letter in "wW" for i in range(40)] + ["zzz"]
    return [" ".join(rng.choice(words, n)) for n in rng.integers(1, 60, count)]


def _ours(folder: Path, texts: list[str], allow_pickle: bool = False) -> np.ndarray:
    """The embeddings of what is exported of `folder`, before the export."""
    checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
    assert checkpoint.pooling is not None
    json.dumps(checkpoint.pooling._asdict())
    model = load_model(checkpoint.model, checkpoint.architecture, allow_pickle=allow_pickle)
    module = Exportable(model, load_embedding(folder, json.loads(json.dumps(checkpoint.pooling._asdict()))))
    place = tokenizer_folder(checkpoint.model, folder)
    assert place is not None
    feeds = load_tokenizer(place, token_limit(checkpoint.model, checkpoint.config)).encode(texts)
    with torch.no_grad():
        found: np.ndarray = module(*(torch.from_numpy(feeds[name]) for name in module.inputs))[-1].numpy()
    return found


def _check(folder: Path, seed: int = 0, **options: Any) -> None:
    texts = _texts(seed)
    wanted = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    np.testing.assert_allclose(_ours(folder, texts, **options), wanted, atol=2e-5, rtol=2e-5)


def _dense(width: int, out: int, **options: Any) -> Any:
    torch.manual_seed(width + out)
    return modules.Dense(width, out, **options)


@pytest.mark.parametrize("mode", MODES)
def test_pooling_modes(mode: str, tmp_path: Path) -> None:
    base = _transformer(tmp_path / "base")
    _check(_saved(tmp_path / "saved", base, modules.Pooling(WIDTH, mode)))


def test_max_pooling_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constant that padding is filled with is no damaged weight."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = _saved(tmp_path / "saved", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "max"))
    engine = load(compile_model(folder, {"passes": ["canonicalize"]}, tmp_path / "build").path)
    texts = _texts(3)
    found = engine.run(engine.tokenize(texts))["sentence_embedding"]
    wanted = library.SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "ForMaskedLM"), ("bert", "ForPreTraining"), ("bert", "ForSequenceClassification"),
        ("roberta", "ForMaskedLM"), ("roberta", "ForTokenClassification"), ("distilbert", "ForQuestionAnswering"),
        ("t5", "ForConditionalGeneration"), ("t5", ""), ("llama", "ForCausalLM"),
    ],
)  # fmt: skip
def test_heads_are_left_out(family: str, head: str, tmp_path: Path) -> None:
    """The library loads the base model, whatever head config.json names and the weights hold."""
    base = _transformer(tmp_path / "base", family, head)
    folder = _saved(tmp_path / "saved", base, modules.Pooling(WIDTH, "mean"), modules.Normalize())
    for name in ("config.json", "model.safetensors"):  # as its authors published it, with the head
        (folder / name).write_bytes((base / name).read_bytes())
    _check(folder)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.architecture == "AutoModel" and head in str(checkpoint.config["architectures"])


def test_a_head_that_only_config_names(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "saved", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    _check(folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    _check(folder)


@pytest.mark.parametrize(
    "behind",
    [
        lambda: [modules.Pooling(WIDTH, ("mean", "cls", "max")), _dense(3 * WIDTH, 20), modules.Normalize()],
        lambda: [modules.Pooling(WIDTH, "cls"), modules.Normalize(),
                 _dense(WIDTH, 24, bias=False, activation_function=None)],
        lambda: [modules.Pooling(WIDTH, "mean"),
                 _dense(WIDTH, 24, use_residual=True, activation_function=torch.nn.GELU()),
                 modules.LayerNorm(24), modules.Dropout(0.5), modules.Normalize()],
        lambda: [modules.Pooling(WIDTH, "max"), _dense(WIDTH, WIDTH, use_residual=True), _dense(WIDTH, 8)],
    ],
)  # fmt: skip
def test_modules_behind_the_pooling(behind: Callable[[], list[Any]], tmp_path: Path) -> None:
    _check(_saved(tmp_path / "saved", _transformer(tmp_path / "base"), *behind()))


def test_a_changed_dense_weight_is_another_model(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "s", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean"), _dense(WIDTH, 8))
    before = read_checkpoint(folder).digest
    other = _dense(WIDTH, 8)
    other.linear.bias.data[3] += 1
    other.save(str(folder / "2_Dense"))
    assert read_checkpoint(folder).digest != before
    _check(folder)


def test_embeddings_that_are_cut(tmp_path: Path) -> None:
    base = _transformer(tmp_path / "base")
    _check(_saved(tmp_path / "saved", base, modules.Pooling(WIDTH, "mean"), modules.Normalize(), truncate_dim=10))


@pytest.mark.parametrize("old", [False, True])
def test_lower_case(old: bool, tmp_path: Path) -> None:
    """Newer versions save it within the tokenizer; older ones say so in sentence_bert_config.json."""
    base = _transformer(tmp_path / "base")
    folder = _saved(tmp_path / "saved", base, modules.Pooling(WIDTH, "mean"), transformer={"do_lower_case": not old})
    if old:
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
        assert read_preparation(folder) == Preparation(lower_case=True)
    _check(folder)
    ids = load_tokenizer(folder).encode(["W1 </s> W2"])["input_ids"]
    np.testing.assert_array_equal(ids, [[0, 5, 2, 6, 2]])  # special tokens in a text stay what they are


@pytest.mark.parametrize("with_prompt", [True, False])
@pytest.mark.parametrize("template", ["<s> $A </s>", "$A"])
@pytest.mark.parametrize("mode", ["mean", "cls", "weightedmean", "lasttoken"])
def test_default_prompts(mode: str, template: str, with_prompt: bool, tmp_path: Path) -> None:
    base = _transformer(tmp_path / "base", template=template)
    pooling = modules.Pooling(WIDTH, mode, include_prompt=with_prompt)
    prompts = {"query": "w9 w8 w7 ", "passage": "w1 "}
    folder = _saved(tmp_path / "saved", base, pooling, prompts=prompts, default_prompt_name="query")
    assert read_preparation(folder).prompt == "w9 w8 w7 "
    _check(folder)


def test_prompts_without_a_default(tmp_path: Path) -> None:
    base, pooling = _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean")
    folder = _saved(tmp_path / "saved", base, pooling, prompts={"query": "w9 "})
    assert read_preparation(folder) == Preparation()
    _check(folder)
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"default_prompt_name": "none"}))
    with pytest.raises(ModelError, match="default_prompt_name is 'none'"):
        read_preparation(folder)


@pytest.mark.parametrize(("limit", "tokenizer"), [(7, 30), (30, 7), (None, 9), (38, None)])
def test_limits(limit: int | None, tokenizer: int | None, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "saved", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean"))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": tokenizer}))
    if tokenizer is None:
        settings = json.loads(path.read_text())
        del settings["model_max_length"]
        path.write_text(json.dumps(settings))
    assert token_limit(folder, read_checkpoint(folder).config) == (limit or tokenizer)
    _check(folder)


def _old(folder: Path) -> None:
    """As versions before 2 wrote it: the transformer in a folder of its own, and flags for pooling modes."""
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(folder / "0_Transformer" / path.name)
    kinds = [
        ("Transformer", "0_Transformer"),
        ("Pooling", "1_Pooling"),
        ("Dense", "2_Dense"),
        ("Normalize", "3_Normalize"),
    ]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    flags = {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH} | flags))
    (folder / "0_Transformer" / "sentence_bert_config.json").unlink()
    (folder / "0_Transformer" / "sentence_roberta_config.json").write_text(
        '{"max_seq_length": 11, "do_lower_case": true}'
    )
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), folder / "2_Dense" / "pytorch_model.bin")
    weights.unlink()


def test_old_folders(tmp_path: Path) -> None:
    base = _transformer(tmp_path / "base", "roberta")
    behind = [modules.Pooling(WIDTH, ("mean", "lasttoken")), _dense(2 * WIDTH, 12), modules.Normalize()]
    folder = _saved(tmp_path / "saved", base, *behind, prompts={"query": "w3 "}, default_prompt_name="query")
    _old(folder)
    with pytest.raises(ModelError, match="pickled"):
        read_checkpoint(folder)
    assert read_preparation(folder / "0_Transformer") == Preparation(True, "w3 ")
    _check(folder, allow_pickle=True)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM"])
def test_without_modules_json(head: str, tmp_path: Path) -> None:
    """The library then pools by the mean, or a language model's last token, and looks at no other file of its own."""
    family = "llama" if head == "ForCausalLM" else "bert"
    usual, other = ("lasttoken", "mean") if family == "llama" else ("mean", "cls")
    folder = _transformer(tmp_path / "base", family, head)
    assert read_checkpoint(folder).pooling is None  # an ordinary model
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": usual}))
    _check(folder)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": other}))
    with pytest.raises(ModelError, match=rf"pools by {other}, but there is no modules\.json"):
        read_checkpoint(folder)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def _module(kind: str, **config: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        listed = json.loads((folder / "modules.json").read_text())
        listed.append({"idx": 9, "name": "9", "path": "9_New", "type": kind})
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "9_New").mkdir()
        _edit(folder / "9_New" / "config.json", **config)

    return spoil


def _only(kind: str, path: str = "") -> Callable[[Path], object]:
    """One module alone."""
    listed = [{"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"}]
    return lambda folder: (folder / "modules.json").write_text(json.dumps(listed))


def _transformer_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: _edit(folder / "sentence_bert_config.json", **changes)


_TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_module("sentence_transformers.models.CNN"), "module CNN is not supported"),
        (_module("sentence_transformers.models.Pooling"), "module Pooling is not supported there"),
        (_module("custom_st.Whitening"), r"custom_st\.Whitening brings its own code"),
        (_module("sentence_transformers.models.Normalize", module_input_name="token_embeddings"),
         "Normalize with module_input_name 'token_embeddings'"),
        (lambda f: _edit(f / "config_sentence_transformers.json", model_type="SparseEncoder"), "a SparseEncoder"),
        (lambda f: _edit(f / "1_Pooling" / "config.json", pooling_mode="attention"), "'attention'.* is not supported"),
        (_transformer_config(transformer_task="fill-mask"), "task fill-mask"),
        (_transformer_config(modality_config={"text": _TEXT, "message": _TEXT}), "chat template"),
        (_transformer_config(modality_config={"text": {"method_output_name": "pooler_output"}}), "other states"),
        (_transformer_config(processing_kwargs={"text": {"max_length": 4}}), "processing_kwargs"),
        (_transformer_config(model_args={"num_hidden_layers": 1}), "sets 'num_hidden_layers'"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter of another model"),
        (lambda f: (f / "modules.json").write_text('{"a": 1}'), r"modules\.json: should be a list"),
        (_only("Transformer", "../x"), "outside"),
        (_only("WordEmbeddings"), "module WordEmbeddings is not supported"),
        (_only("Transformer"), "has no Pooling"),
    ],
)  # fmt: skip
def test_refusals(spoil: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "saved", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean"))
    read_checkpoint(folder)
    spoil(folder)
    with pytest.raises(TrimtabError, match=says) as caught:
        read_checkpoint(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation_function": "os.system"}, "activation os.system is not supported"),
        ({"activation_function": "torch.nn.modules.activation.MultiheadAttention"}, "MultiheadAttention is not"),
        ({"out_features": 9}, "do not fit"),
        ({"in_features": "many"}, "in_features: should be a whole number"),
    ],
)  # fmt: skip
def test_dense_that_does_not_fit(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = _saved(tmp_path / "s", _transformer(tmp_path / "base"), modules.Pooling(WIDTH, "mean"), _dense(WIDTH, 8))
    _edit(folder / "2_Dense" / "config.json", **changes)
    with pytest.raises(ModelError, match=says):
        _ours(folder, ["w1"])


def test_rerankers_are_classifiers(tmp_path: Path) -> None:
    base = _transformer(tmp_path / "base", head="ForSequenceClassification")
    library.CrossEncoder(str(base), device="cpu").save_pretrained(str(tmp_path / "saved"))
    checkpoint = read_checkpoint(tmp_path / "saved")
    assert checkpoint.pooling is None and checkpoint.architecture == "BertForSequenceClassification"


def test_every_mode_in_a_graph(tmp_path: Path) -> None:
    """All modes joined, exported and run: what the library's own module gives, wherever the padding is."""
    rng, skip = seeded(), 3
    config = {"modes": MODES, "skip": skip, "layers": [["Normalize", "", {}]], "width": None}
    module, batch, tokens = load_embedding(tmp_path, config), 5, 9
    states = torch.from_numpy(rng.standard_normal((batch, tokens, 4), dtype=np.float32))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 4 + [0] * 5, [0] * 3 + [1] * 6, [0] * 4 + [1] * 5])
    dims = {0: "batch", 1: "tokens"}
    export_module(
        module, (states[:2, :7], mask[:2, :7]), tmp_path / "m.onnx", dynamic_shapes=(dims, dims),
        input_names=("states", "mask"), output_names=("embedding",),
    )  # fmt: skip
    pooling = modules.Pooling(4, MODES, include_prompt=False)
    features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": skip}
    wanted = torch.nn.functional.normalize(pooling(features)["sentence_embedding"], dim=-1).numpy()
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"states": states.numpy(), "mask": mask.numpy()})
    np.testing.assert_allclose(found, wanted, atol=1e-5)
