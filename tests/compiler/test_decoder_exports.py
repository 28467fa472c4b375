"""Decoders beyond the usual: mixtures of experts, and those whose attention takes no cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from rewrite import canonical
from seeds import seeded

from trimtab.compiler.sources import open_source
from trimtab.compiler.sources.decoder import Decoder, why_uncached
from trimtab.compiler.sources.export import load_model
from trimtab.compiler.sources.torch_export import export_module
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes import PassContext, run_passes
from trimtab.passes.anatomy import find_anatomy, require_ffns
from trimtab.passes.contract import Capability
from trimtab.passes.errors import ModelError, RecipeError
from trimtab.passes.weight_only import WeightOnly

VOCABULARY = 83
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 52, "num_key_value_heads": 2, "max_position_embeddings": 40, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {
        "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None, "num_hidden_layers": 1,
    }),
    "qwen2_moe": ("Qwen2Moe", {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 28,
    }),
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
WITHOUT_CACHE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", GPT | {"hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "falcon": ("Falcon", GPT | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
}


def model_of(name: str, sizes: dict[str, Any]) -> Any:
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(int(seeded().integers(1 << 30)))
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def padded_batch() -> tuple[np.ndarray, np.ndarray]:
    ids = seeded().integers(3, VOCABULARY, (3, 9))
    return ids, (np.arange(9) < np.array([[9], [5], [7]])).astype(np.int64)


def torch_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).logits.numpy()
    return result


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A mixture of experts, as the checkpoint is loaded for export, and its file."""
    name, sizes = MIXTURES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = model_of(name, SIZES | sizes)
    model.save_pretrained(folder)
    loaded = load_model(folder, f"{name}ForCausalLM")
    Decoder(loaded).export(folder / "model.onnx")
    return model, folder / "model.onnx"


def test_a_mixture_of_experts(mixture: tuple[Any, Path]) -> None:
    """A prompt, and a step behind it: each token goes to its own experts."""
    model, path = mixture
    ids, mask = padded_batch()
    runner = OnnxRuntimeRunner(path)
    steps = runner.steps(3, 10)
    real = mask != 0
    np.testing.assert_allclose(steps.run(ids, mask)[real], torch_logits(model, ids, mask)[real], atol=1e-4, rtol=1e-4)
    single, whole = seeded().integers(3, VOCABULARY, (1, 10)), np.ones((1, 10), np.int64)
    steps = runner.steps(1, 10)
    steps.run(single[:, :9], whole[:, :9])
    last = steps.run(single[:, 9:], whole)
    np.testing.assert_allclose(last[:, 0], torch_logits(model, single, whole)[:, -1], atol=1e-4, rtol=1e-4)


def test_experts_are_left_by_name(mixture: tuple[Any, Path]) -> None:
    """In the anatomy, in reports of passes, and where a model has no other FFN."""
    model, path = mixture
    config = model.config
    dense = getattr(config, "mlp_only_layers", [])
    count = getattr(config, "num_local_experts", None) or config.num_experts
    graph = canonical(path)
    anatomy = find_anatomy(graph)
    mixtures = config.num_hidden_layers - len(dense)
    assert [each.what for each in anatomy.unrecognized] == ["experts"] * mixtures  # no router among them
    assert all(f"a mixture of {count} experts" in each.why for each in anatomy.unrecognized)
    if not dense:
        with pytest.raises(ModelError, match=f"no FFN was found.*experts at node .*a mixture of {count} experts"):
            require_ffns(anatomy)
    context = PassContext(capability=Capability(weight_bits=frozenset({4, 8})))
    (result,) = run_passes(graph, [WeightOnly(bits=8, block=16)], context)
    named = [place for place in result.left if place.where.startswith("experts at node ")]
    assert len(named) == mixtures and all("stay as they are" in place.why for place in named)


def test_experts_of_one_op_are_named() -> None:
    """As ONNX Runtime GenAI's builder writes them."""
    import onnx_graphsurgeon as gs

    from trimtab.passes.anatomy.experts import find_experts

    weights = [gs.Constant(f"w{i}", np.zeros((7, 8, 4), np.float32)) for i in range(2)]
    inputs = [gs.Variable("x", np.float32, ["rows", 4]), gs.Variable("scores", np.float32, ["rows", 7])]
    node = gs.Node("MoE", "mixed", inputs=[*inputs, *weights], outputs=[gs.Variable("y")], domain="com.microsoft")
    (experts,) = find_experts([node])
    assert (experts.count, experts.choice) == (7, inputs[1])


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_attention_that_takes_no_cache(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is exported without one, and that is said each time the model is opened."""
    name, sizes = WITHOUT_CACHE[family]
    model = model_of(name, sizes)
    model.save_pretrained(tmp_path / "model")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "trimtab"):
            source = open_source(tmp_path / "model")
        (said,) = [record.getMessage() for record in caplog.records]
        assert f"{name}ForCausalLM is exported without a cache" in said and "attention interface" in said
    ids, mask = padded_batch()
    runner = OnnxRuntimeRunner(source.onnx)
    assert not [name for name in runner.inputs if name.startswith("past")]
    found, real = runner.run({"input_ids": ids, "attention_mask": mask})["logits"], mask != 0
    np.testing.assert_allclose(found[real], torch_logits(model, ids, mask)[real], atol=1e-4, rtol=1e-4)


def test_why_a_model_has_no_cache() -> None:
    assert why_uncached(model_of("Llama", SIZES)) is None
    assert "multiples of 8" in str(why_uncached(model_of("Llama", SIZES | {"hidden_size": 48})))
    sinks = model_of("GptOss", SIZES | {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2})
    assert "sinks" in str(why_uncached(sinks))
    none = model_of("Mamba", {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4})
    assert "no attention heads" in str(why_uncached(none))


class Decomposing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


class Choosing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Fixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ones(5)


class Refusing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RecipeError("this is no good", hint="do that")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Decomposing(), "no ONNX form of the operator aten._linalg_svd"),
        (Choosing(), "depends on the values of tensors"),
        (Fixed(), "one fixed size where a dimension has to be dynamic"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_why_torch_cannot_export(module: torch.nn.Module, says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        export_module(module, (torch.ones(2, 5),), tmp_path / "m.onnx", dynamic_shapes=({0: "batch", 1: "tokens"},))
    text = json.dumps(str(caught.value))
    assert text.startswith(f'"{type(module).__name__}: torch cannot export it')
    assert not [raw for raw in ("stack trace", "call_function", "Error", "guard on", "Traceback") if raw in text]
    assert caught.value.__cause__ is None


def test_errors_of_the_module_itself_stay_what_they_are(tmp_path: Path) -> None:
    """One reason and one way out, not those of the exporter around them."""
    with pytest.raises(RecipeError) as caught:
        export_module(Refusing(), (torch.ones(2, 5),), tmp_path / "m.onnx")
    assert (caught.value.message, caught.value.hint) == ("this is no good", "do that")
