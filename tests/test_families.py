"""Every family through every exporter: the ONNX file computes what torch computes, at any batch and length."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from seeds import seeded
from zoo import FAMILIES, exported, feeds, tiny_model

from trimtab.passes.graph import load_graph

SHAPES = ((2, 9), (1, 1), (1, 13), (5, 1), (3, 31))


def run(path, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, each) for each in inputs]


def reference(family, inputs):
    with torch.no_grad():
        return tiny_model(family)(**{name: torch.from_numpy(array) for name, array in inputs.items()})[0].numpy()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_equals_torch(family, exporter):
    rng = seeded()
    inputs = [feeds(family, batch, tokens, rng) for batch, tokens in SHAPES]
    found = run(exported(family, exporter), inputs)
    for each, (got,) in zip(inputs, found, strict=True):
        np.testing.assert_allclose(got, reference(family, each), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_outputs_have_the_agreed_names(family):
    graph = load_graph(exported(family))
    assert [tensor.name for tensor in graph.inputs] == list(feeds(family, 1, 2, np.random.default_rng(0)))
    text = ["batch", "tokens"] if family != "vit" else ["batch"]
    assert all(tensor.shape[: len(text)] == text for tensor in graph.inputs)
    assert [tensor.name for tensor in graph.outputs] == [
        "last_hidden_state" if family in ("distilbert", "t5") else "logits"
    ]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "vit"])
def test_padding_does_not_change_the_rest(family):
    """Without the mask in the graph, padding would leak into the other tokens."""
    short = feeds(family, 1, 6, seeded())
    short["attention_mask"][:] = 1
    long = {name: np.pad(array, ((0, 0), (0, 5))) for name, array in short.items()}
    ((got_short,), (got_long,)) = run(exported(family), [short, long])
    np.testing.assert_allclose(got_long[:, :6] if got_long.ndim == 3 else got_long, got_short, atol=2e-5, rtol=2e-5)


def test_genai_equals_torch():
    """The model builder's graph, prompt at once and token by token: its cache is part of the interface."""
    rng = seeded()
    config = tiny_model("llama").config
    ids = feeds("llama", 2, 11, rng)["input_ids"]
    expected = reference("llama", {"input_ids": ids})
    session = ort.InferenceSession(exported("llama", "genai"), providers=["CPUExecutionProvider"])
    head = config.hidden_size // config.num_attention_heads
    past = {i.name: np.zeros((2, config.num_key_value_heads, 0, head), np.float32) for i in session.get_inputs()[2:]}
    names = [output.name for output in session.get_outputs()]
    for start, end in ((0, 9), (9, 10), (10, 11)):
        mask = np.ones((2, end), np.int64)
        outputs = dict(
            zip(names, session.run(None, {"input_ids": ids[:, start:end], "attention_mask": mask, **past}), strict=True)
        )
        np.testing.assert_allclose(outputs["logits"], expected[:, start:end], atol=2e-4, rtol=2e-4)
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    domains = {node.domain for node in load_graph(exported("llama", "genai")).nodes}
    assert "com.microsoft" in domains
