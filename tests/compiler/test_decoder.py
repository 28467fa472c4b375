"""Decoders with their cache: what comes at once, step by step, alone and in company is what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import zoo
from rewrite import canonical
from seeds import seeded

from trimtab.compiler.decoder_cache import Cache
from trimtab.compiler.targets.sessions import OnnxRuntimeRunner
from trimtab.passes.anatomy import find_anatomy
from trimtab.passes.errors import TargetError


def logits(family: str, ids: np.ndarray) -> np.ndarray:
    """What torch computes for one text, [tokens, vocabulary]."""
    with torch.no_grad():
        found: np.ndarray = zoo.tiny_model(family)(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


def texts(family: str, lengths: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    vocabulary = zoo.tiny_model(family).config.vocab_size
    return [rng.integers(3, vocabulary, length) for length in lengths]


def padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids filled up behind, and their mask."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


@pytest.mark.parametrize("exporter", ["cached", "genai"])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_steps_compute_what_torch_does(family: str, exporter: str) -> None:
    """Texts of different lengths in one batch: a prompt, then one token at a time over what was filled up."""
    if exporter == "genai" and family != "llama":
        pytest.skip("the builder's own check is on llama")
    rng = seeded()
    # GenAI's builder takes the position from the mask too, but pads in front: there, rows of one length.
    prompts, total = ([4, 9, 1] if exporter == "cached" else [5, 5]), 5
    rows = texts(family, [length + total for length in prompts], rng)
    wanted = [logits(family, row) for row in rows]
    runner = OnnxRuntimeRunner(zoo.exported(family, exporter))
    steps = runner.steps(len(rows), max(prompts) + total)
    ids, mask = padded([row[:length] for row, length in zip(rows, prompts, strict=True)])
    found = steps.run(ids, mask)
    for row, length, want in zip(found, prompts, wanted, strict=True):
        np.testing.assert_allclose(row[:length], want[:length], atol=2e-4, rtol=2e-4)
    for step in range(total):
        mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], 1)
        token = np.array([[row[length + step]] for row, length in zip(rows, prompts, strict=True)])
        found = steps.run(token, mask)
        for row, length, want in zip(found, prompts, wanted, strict=True):
            np.testing.assert_allclose(row[0], want[length + step], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_a_second_part_of_a_prompt_goes_on_from_the_first(family: str) -> None:
    (row,) = texts(family, [12], seeded())
    steps = OnnxRuntimeRunner(zoo.exported(family, "cached")).steps(1, 12)
    steps.run(row[None, :5], np.ones((1, 5), np.int64))
    found = steps.run(row[None, 5:], np.ones((1, 12), np.int64))
    np.testing.assert_allclose(found[0], logits(family, row)[5:], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_its_parts_are_found(family: str) -> None:
    plain = find_anatomy(canonical(zoo.exported(family)))
    graph = canonical(zoo.exported(family, "cached"))
    cached = find_anatomy(graph)
    assert [f.activation.name for f in cached.ffns] == [f.activation.name for f in plain.ffns]
    for ours, theirs in zip(cached.attentions, plain.attentions, strict=True):
        assert (ours.heads, ours.kv_heads, ours.head_dim) == (theirs.heads, theirs.kv_heads, theirs.head_dim)
        assert len(ours.linears) == len(theirs.linears)
    assert not cached.unrecognized and cached.head is not None
    shapes = {tensor.name: tensor.shape for tensor in graph.inputs}
    assert shapes["input_ids"] == ["batch", "tokens"] and shapes["attention_mask"] == ["batch", "total"]
    assert next(name for name in shapes if name.startswith("past")) == "past_key_values.0.key"


def test_a_cache_that_grows_is_handed_on(tmp_path: Path) -> None:
    """A decoder that joins past and new keys by Concat, as other exporters write it."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (int64[B,T] input_ids, int64[B,S] attention_mask, float[B,1,P,1] "past_key_values.0.key")
      => (float[B,1,1] logits, float[B,1,S,1] "present.0.key")
    {
      f = Cast <to = 1> (input_ids)
      axes = Constant <value_ints = [1, 3]> ()
      two = Constant <value_ints = [2]> ()
      new = Unsqueeze (f, axes)
      "present.0.key" = Concat <axis = 2> ("past_key_values.0.key", new)
      logits = ReduceSum <keepdims = 0> ("present.0.key", two)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    assert not Cache.of(tmp_path / "model.onnx").in_place
    steps = OnnxRuntimeRunner(tmp_path / "model.onnx").steps(2, 100)
    first = steps.run(np.array([[1, 2], [3, 4]]), np.ones((2, 2), np.int64))
    second = steps.run(np.array([[10], [20]]), np.ones((2, 3), np.int64))
    third = steps.run(np.array([[100], [200]]), np.ones((2, 4), np.int64))
    assert [sums.reshape(-1).tolist() for sums in (first, second, third)] == [[3, 7], [13, 27], [113, 227]]


def test_what_has_no_cache_takes_no_steps() -> None:
    with pytest.raises(TargetError, match="no cache"):
        OnnxRuntimeRunner(zoo.exported("gpt2")).steps(1, 8)


@pytest.mark.parametrize("kind", ["window", "softcap"])
def test_attention_beyond_the_usual(kind: str, tmp_path: Path) -> None:
    """A window (Mistral) and capped scores (Gemma 2) are attributes of the exported op."""
    import transformers

    from trimtab.compiler.sources.decoder import Decoder

    sizes = {
        "vocab_size": 89, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "window":
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, sliding_window=4))
    else:
        config = transformers.Gemma2Config(
            **sizes, sliding_window=6, attn_logit_softcapping=0.5, query_pre_attn_scalar=8
        )
        model = transformers.Gemma2ForCausalLM(config)
    model.eval().set_attn_implementation("eager")
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    ids = torch.randint(1, 89, (1, 14))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0].numpy()
    Decoder(model).export(tmp_path / "model.onnx")
    steps = OnnxRuntimeRunner(tmp_path / "model.onnx").steps(1, 14)
    found = [steps.run(ids[:, :9].numpy(), np.ones((1, 9), np.int64))[0]]
    found += [steps.run(ids[:, i : i + 1].numpy(), np.ones((1, i + 1), np.int64))[0] for i in range(9, 14)]
    np.testing.assert_allclose(np.concatenate(found), wanted, atol=2e-4, rtol=2e-4)
