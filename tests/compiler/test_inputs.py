"""Inputs that a runtime would take and answer wrongly are refused by name, in calls and in data files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
import zoo
from seeds import seeded

from trimtab.compiler import compile_model, load
from trimtab.compiler.builds.manifest import TensorInfo
from trimtab.compiler.data import batches, read_data
from trimtab.compiler.engine import Engine
from trimtab.compiler.feeds import random_feeds
from trimtab.compiler.inputs import check_inputs
from trimtab.compiler.sources import open_source
from trimtab.passes.errors import DataError, InputError
from trimtab.passes.graph import load_graph
from trimtab.passes.graph.limits import Packed
from trimtab.passes.graph.ranges import packed_mask

DECODING = {"passes": [], "workload": {"batch": [1, 2, 4], "tokens": [1, 8, 16], "past": [0, 8, 16]}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("inputs")
    return load(compile_model(tiny.model(folder / "model.onnx"), {"passes": []}, folder / "build").path)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def decoder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Engine]:
    folder = tmp_path_factory.mktemp("decoder")
    build = compile_model(zoo.exported(request.param, "cached"), DECODING, folder / "build")
    return request.param, load(build.path)


def _feeds(engine: Engine, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray] | None = None) -> Any:
    shapes = {t.name: t.shape or () for t in engine.inputs if t.name.startswith("past")}
    empty = {name: np.zeros((len(ids), *(n if isinstance(n, int) else 0 for n in shape[1:])), np.float32)
             for name, shape in shapes.items()}  # fmt: skip
    return {"input_ids": ids, "attention_mask": mask} | (past or empty)


@pytest.mark.parametrize("wrong", [-1, -tiny.ROWS, tiny.ROWS, 1 << 40, -(1 << 40)])
def test_ids_outside_the_table(engine: Engine, wrong: int) -> None:
    ids = tiny.ids(3, 9)
    ids[0, 1], ids[2, 4] = tiny.ROWS - 1, 0
    engine.run({"input_ids": ids})
    ids[1, 5] = wrong
    with pytest.raises(InputError, match=rf"'input_ids' holds {wrong} at \[1, 5\], the engine takes 0 to 49"):
        engine.run({"input_ids": ids})


def test_arrays_that_lie_apart(engine: Engine) -> None:
    ids = tiny.ids(3, 18)
    wanted = engine.run({"input_ids": ids[:, ::2].copy()})["last_hidden_state"]
    np.testing.assert_array_equal(engine.run({"input_ids": ids[:, ::2]})["last_hidden_state"], wanted)
    turned = np.asfortranarray(ids[:, ::2])
    np.testing.assert_array_equal(engine.run({"input_ids": turned})["last_hidden_state"], wanted)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (np.int64(3), "is a int64, not a numpy array|is a .*not a numpy array"),
        (np.array(3), r"shape \[\]"),
        (np.zeros((1, 4), bool), "is bool"),
        (np.zeros((1, 4), ">i8"), "convert it"),
        (np.zeros((1, 4), object), "is object"),
        ([[1, 2]], "is a list"),
        (None, "NoneType|None"),
    ],
)
def test_what_is_no_array_of_ids(engine: Engine, wrong: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        engine.run({"input_ids": wrong})


def test_ids_in_a_data_file(tmp_path: Path) -> None:
    source, ids = open_source(tiny.model(tmp_path / "model.onnx")), tiny.ids(20, 6)
    ids[13, 2] = -1
    np.savez(tmp_path / "data.npz", input_ids=ids)
    with pytest.raises(DataError, match=r"data\.npz: input 'input_ids' holds -1 at \[13, 2\]"):
        list(batches(read_data(tmp_path / "data.npz"), source))


@pytest.mark.parametrize("value", [2, -1])
def test_a_mask_of_other_numbers(decoder: tuple[str, Engine], value: int) -> None:
    ids, mask = np.full((2, 4), 5), np.ones((2, 4), np.int64)
    mask[1, 2] = value
    with pytest.raises(InputError, match=rf"'attention_mask' holds {value} at \[1, 2\]; give 1 for tokens and 0"):
        decoder[1].run(_feeds(decoder[1], ids, mask))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0, 1, 1, 1], r"padding on the left in row 1.*pad on the right"),
        ([0, 0, 0, 1], "padding on the left"),
        ([1, 0, 1, 1], "padding between tokens in row 1"),
        ([1, 0, 1, 0], "padding between tokens"),
        ([0, 0, 0, 0], "no token in row 1"),
    ],
)
def test_padding_that_attention_takes_for_tokens(decoder: tuple[str, Engine], row: list[int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        decoder[1].run(_feeds(decoder[1], np.full((2, 4), 5), np.array([[1, 1, 1, 1], row])))


def test_steps_of_a_decoder(decoder: tuple[str, Engine]) -> None:
    """Prompts of different lengths and steps behind them are taken, whatever lies in the past; and are right."""
    family, engine = decoder
    rng, lengths = seeded(), (2, 5)
    rows = rng.integers(3, 100, (2, 7))
    with torch.no_grad():
        wanted = zoo.tiny_model(family)(input_ids=torch.from_numpy(rows)).logits.numpy()
    mask = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int64)
    outputs = engine.run(_feeds(engine, rows[:, :5] * mask, mask))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(outputs["logits"][row, :length], wanted[row, :length], atol=2e-4, rtol=2e-4)
    for step in range(2):
        past = {f"past_key_values.{n[8:]}": outputs[n] for n in outputs if n.startswith("present.")}
        token = np.array([[rows[row, length + step]] for row, length in enumerate(lengths)])
        short = _feeds(engine, token, np.ones((2, 1), np.int64), past)
        with pytest.raises(InputError, match=f"'attention_mask' has 1 columns, for {5 + step} tokens of the past and"):
            engine.run(short)
        with pytest.raises(InputError, match="no token in row 1"):
            engine.run(_feeds(engine, token, np.concatenate([mask, np.array([[1], [0]])], 1), past))
        mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)  # has a hole in the past of row 0
        outputs = engine.run(_feeds(engine, token, mask, past))
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(outputs["logits"][row, 0], wanted[row, length + step], atol=2e-4, rtol=2e-4)


def test_padding_behind_a_past(decoder: tuple[str, Engine]) -> None:
    engine = decoder[1]
    outputs = engine.run(_feeds(engine, np.full((1, 3), 5), np.ones((1, 3), np.int64)))
    past = {f"past_key_values.{n[8:]}": outputs[n] for n in outputs if n.startswith("present.")}
    with pytest.raises(InputError, match="padding in row 0 behind 3 tokens of the past"):
        engine.run(_feeds(engine, np.full((1, 4), 5), np.array([[1, 1, 1, 1, 1, 1, 0]]), past))


def test_plain_attention_takes_any_mask(tmp_path: Path) -> None:
    """A foreign decoder whose graph works with any mask is not held to padding on the right."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (int64[batch, tokens] input_ids, int64[batch, tokens] attention_mask) => (float[batch, tokens] logits)
    {
      bias = Cast <to = 1> (attention_mask)
      word = Cast <to = 1> (input_ids)
      logits = Mul (word, bias)
    }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    engine = load(compile_model(tmp_path / "model.onnx", {"passes": []}, tmp_path / "build").path)
    feeds = {"input_ids": np.array([[7, 8, 9]]), "attention_mask": np.array([[0, 1, 0]])}
    assert engine.run(feeds)["logits"].tolist() == [[0, 8, 0]]
    with pytest.raises(InputError, match="holds 3"):
        engine.run(feeds | {"attention_mask": np.array([[0, 1, 3]])})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0, 0, 0, 1, 1, 1], "padding on the left in row 1"),
        ([0, 1, 1, 1, 1, 1], "padding on the left in row 1"),
        ([1, 0, 1, 0, 1, 1], "padding between tokens in row 1"),
        ([1, 0, 1, 1, 0, 1], "padding between tokens in row 1"),
        ([1, 1, 1, 1, 0, 1], None),  # a prompt of 4 among longer ones, and its first step
        ([1, 1, 0, 0, 1, 1], None),  # a prompt of 2, and its second step
        ([0, 0, 0, 0, 0, 1], None),  # no past, of which nothing is seen
    ],
)
def test_zeros_in_the_past(decoder: tuple[str, Engine], row: list[int], says: str | None) -> None:
    """Zeros that calls leave behind are right: attention sees as many tokens of the past as the row has."""
    family, engine = decoder
    ids = seeded().integers(3, 100, (2, 6))
    mask = np.array([[1] * 6, row])
    outputs = engine.run(_feeds(engine, ids[:, :5], np.ones((2, 5), np.int64)))
    past = {f"past_key_values.{n[8:]}": outputs[n] for n in outputs if n.startswith("present.")}
    step = _feeds(engine, ids[:, 5:], mask, past)
    if says is not None:
        with pytest.raises(InputError, match=says):
            engine.run(step)
        return
    kept = [*range(sum(row) - 1), 5]
    with torch.no_grad():
        wanted = zoo.tiny_model(family)(input_ids=torch.from_numpy(ids[1:, kept])).logits.numpy()
    np.testing.assert_allclose(engine.run(step)["logits"][1, 0], wanted[0, -1], atol=2e-4, rtol=2e-4)


def _ask(bounds: dict[str, tuple[int, int]], packed: list[Packed] | None = None, /, **given: Any) -> None:
    """`check_inputs` of arrays whose axes have no names."""
    arrays = {name: np.asarray(array) for name, array in given.items()}
    wanted = [
        TensorInfo(name=name, dtype=str(array.dtype), shape=(None,) * array.ndim, bounds=bounds.get(name))
        for name, array in arrays.items()
    ]
    check_inputs(wanted, arrays, packed or [])


@pytest.mark.parametrize("wrong", [-1.0, 1.5, 50.0, -0.5, np.nan, np.inf])
def test_ids_that_are_floats(wrong: float) -> None:
    _ask({"input_ids": (0, 49)}, input_ids=[[0.0, 49.0]])
    with pytest.raises(InputError, match=rf"'input_ids' holds {wrong} at \[0, 1\], the engine takes 0 to 49; make"):
        _ask({"input_ids": (0, 49)}, input_ids=[[3.0, wrong]])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (b"text", "holds a bytes at place 1, not a text"), (7, "holds a int at place 1"), (None, "holds a NoneType"),
        (["a"], "holds a list"), ("\ud800", "holds half a character at place 1"),
    ],
)  # fmt: skip
def test_texts_that_are_none(wrong: Any, says: str) -> None:
    """ONNX Runtime would compute with what Python shows of them."""
    wanted = [TensorInfo(name="s", dtype="object", shape=("batch",))]
    values = np.empty(3, object)
    values[:] = "a", "", "é"
    check_inputs(wanted, {"s": values})
    values[1] = wrong
    with pytest.raises(InputError, match=says):
        check_inputs(wanted, {"s": values})
    with pytest.raises(InputError, match=r"convert it with \.astype\(object\)"):
        check_inputs(wanted, {"s": np.array(["a", "b"])})


def test_floats_that_a_graph_cuts_to_rows() -> None:
    _ask({"timestep": (0, 49)}, timestep=[49.9, -0.5])
    with pytest.raises(InputError, match=r"'timestep' holds 50\.0 at .*; give whole numbers from 0 to 49"):
        _ask({"timestep": (0, 49)}, timestep=[50.0])


def test_positions_behind_an_offset() -> None:
    _ask({"position_ids": (-2, 31)}, position_ids=[[-1, -1, 0, 1]])
    with pytest.raises(InputError, match=r"'position_ids' holds -3 .*; give whole numbers from -2 to 31"):
        _ask({"position_ids": (-2, 31)}, position_ids=[[-3, 0]])


@pytest.mark.parametrize("name", ["attention_mask", "input_mask", "mask"])
def test_masks_by_name(name: str) -> None:
    for right in ([[1, 0]], [[True, False]], [[0.0, -np.inf]], [[0.0, -1e4]]):
        _ask({}, **{name: right})
    for wrong in ([[1, 2]], [[1, -1]], [[1.0, np.nan]]):
        with pytest.raises(InputError, match=rf"'{name}' holds .* at \[0, 1\]"):
            _ask({}, **{name: wrong})
    with pytest.raises(InputError, match=r"holds 0\.5"):
        _ask({}, [Packed(name, None)], **{name: [[1.0, 0.5]]})


@pytest.mark.parametrize("kind", [bool, np.float32, np.int32])
def test_counted_masks_of_any_type(kind: type) -> None:
    _ask({}, [Packed("m", None)], m=np.array([[1, 1, 0]], kind))
    with pytest.raises(InputError, match="padding on the left in row 0"):
        _ask({}, [Packed("m", None)], m=np.array([[0, 1, 1]], kind))


def test_sizes_beside_ids() -> None:
    ids, one = np.ones((2, 5), np.int64), np.ones((1, 5), np.int64)
    _ask({}, input_ids=ids, position_ids=one, token_type_ids=one, attention_mask=np.ones((2, 9), np.int64))
    _ask({}, input_ids=ids, attention_mask=np.ones((2, 1, 5, 5), np.int64))
    for name, shape in (("attention_mask", (1, 5)), ("attention_mask", (3, 5)), ("token_type_ids", (3, 5))):
        with pytest.raises(InputError, match=f"'input_ids' and '{name}' disagree on their rows: 2 and {shape[0]}"):
            _ask({}, input_ids=ids, **{name: np.ones(shape, np.int64)})
    with pytest.raises(InputError, match="'attention_mask' has 1 columns for 5"):
        _ask({}, input_ids=ids, attention_mask=np.ones((2, 1), np.int64))
    _ask({}, input_ids=ids, attention_mask=np.ones((2, 3), np.int64), encoder_hidden_states=np.ones((2, 3, 4)))


def test_two_streams_with_a_mask_each() -> None:
    def ones(columns: int) -> np.ndarray:
        return np.ones((2, columns), np.int64)

    bounds = {"query_ids": (0, 99), "doc_ids": (0, 99)}
    packed = [Packed("query_mask", None, ("query_ids",)), Packed("doc_mask", None, ("doc_ids", "field_ids"))]
    given = {"query_ids": ones(4), "doc_ids": ones(9), "doc_mask": ones(9), "field_ids": ones(1)}
    _ask(bounds, packed, **given, query_mask=ones(4))
    with pytest.raises(InputError, match="'query_mask' has 9 columns, for 0 tokens of the past and 4 new ones"):
        _ask(bounds, packed, **given, query_mask=ones(9))


@pytest.mark.parametrize(
    ("family", "exporter"),
    [(family, exporter) for family in zoo.FAMILIES for exporter in ("dynamo", "torchscript")]
    + [(family, "cached") for family in zoo.DECODERS],
)
def test_right_inputs_of_every_family(family: str, exporter: str) -> None:
    """What is right for a model is taken: random inputs and padded rows, with a past and without."""
    graph, rng = load_graph(zoo.exported(family, exporter)), seeded()
    wanted = [TensorInfo.of(tensor) for tensor in graph.inputs]
    packed = [mask for tensor in graph.inputs if (mask := packed_mask(tensor))]
    for past in (0, 5):
        dims = {"batch": 3, "tokens": 7, "past": past}
        for padded in (False, not past):
            check_inputs(wanted, random_feeds(graph, dims, rng, padded=padded), packed)
    if exporter in ("dynamo", "torchscript"):
        check_inputs(wanted, {t.name: zoo.feeds(family, 3, 7, rng)[t.name] for t in wanted}, packed)
